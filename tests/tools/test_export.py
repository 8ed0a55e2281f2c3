import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_d2 import example
from ris_d2.predictor import Predictor

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from ris_d2.refshapes import write_tokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(str(path))
    return str(path)


# Fewer layers, so that it takes seconds; all queries, of which random scores choose none.
CHANGES = {
    "deris": [
        *("MODEL.DERIS.ROUNDS", "1", "MODEL.DERIS.PIXEL_DECODER_LAYERS", "1"),
        *("MODEL.DERIS.SCORE_THRESHOLD", "0.0"),
    ]
}


@pytest.mark.parametrize("method", ["asda", "deris", "risam", "shared_ris", "vipa"])
def test_onnxruntime_agrees_with_the_model(method, tokenizer, tmp_path, load_tool):
    """On one image with 1, 2 and 8 sentences of several lengths, none of which the trace has seen."""
    rows = load_tool("export").main(
        [
            *("--config-file", str(REPOSITORY / f"configs/instant_test/{method}.yaml")),
            *("--output", str(tmp_path), "--repeats", "1"),
            *("MODEL.WEIGHTS", "", "INPUT.RIS.TOKENIZER.PATH", tokenizer),
            *CHANGES.get(method, []),
        ]
    )
    assert [row["difference"] <= 1e-3 for row in rows] == [True] * 4
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"image.onnx", "sentences.onnx", "export.json", "tokenizer.json"}


def test_the_example_of_the_documentation_runs_without_torch_and_gives_the_models_masks(
    tmp_path, load_tool
):
    load_tool("export").main(["--model", example.FOLDER, "--output", str(tmp_path / "onnx")])
    text = (REPOSITORY / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 20
    sentences = re.findall(r'"(the [a-z ]+)"', code)
    Image.open(example.SCENE).save(tmp_path / "scene.png")
    forbidden = "import sys; sys.modules.update(torch=None, ris_d2=None, transformers=None)\n"
    done = subprocess.run(
        [sys.executable, "-c", forbidden + code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    predictor = Predictor.from_pretrained(example.FOLDER)
    for sentence, result in zip(sentences, predictor(example.SCENE, sentences), strict=True):
        mask, expected = np.array(Image.open(tmp_path / f"{sentence}.png")), result["mask"].numpy()
        assert (mask & expected).sum() >= 0.98 * (mask | expected).sum()
        assert mask.any() == (sentence == example.SENTENCES[1])  # the other one is not there
        assert f"{sentence}: score {result['score']:.2f}" in done.stdout


def test_what_is_missing_is_named(tmp_path, load_tool, monkeypatch, tiny_config):
    tool = load_tool("export")
    monkeypatch.setattr(tool, "NEEDED", ("onnx_of_another_world", "json"))
    with pytest.raises(ValueError, match=r"^no onnx_of_another_world here: pip install"):
        tool.main(["--config-file", tiny_config, "--output", str(tmp_path)])
    for arguments in ([], ["--model", "m", "--config-file", "c"]):
        with pytest.raises(SystemExit):
            tool.parse([*arguments, "--output", "o"])
