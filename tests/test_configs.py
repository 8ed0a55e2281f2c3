"""Every yaml in configs/ and every key of ris_d2."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from ris_d2 import get_ris_cfg, load_config, refshapes
from ris_d2.data.augmentations import build_augmentations
from ris_d2.data.catalog import register_all, register_from_config
from ris_d2.engine import Trainer
from ris_d2.engine.schedule import with_iterations
from ris_d2.modeling.asda import ASDA
from ris_d2.modeling.backbone import RISViT
from ris_d2.modeling.deris import DeRIS
from ris_d2.modeling.risam import RISAM
from ris_d2.modeling.text import RISCausalLM, build_text_encoder
from ris_d2.modeling.vipa import VIPA
from ris_d2.paper_tables import read_paper_row, row_names

CONFIGS = Path(__file__).parents[1] / "configs"
LEAVES = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob("*.yaml")
    # studies are tools/study.py's, papers are tables of rows
    if "Base" not in p.name and p.parent.name not in ("studies", "papers")
)
ROWS = sorted(
    f"papers/{p.name}:{row}" for p in (CONFIGS / "papers").iterdir() for row in row_names(str(p))
)


@pytest.mark.parametrize("leaf", [*LEAVES, *ROWS])
def test_leaf_loads_builds_and_names_known_datasets(leaf):
    cfg = load_config(str(CONFIGS / leaf))
    with torch.device("meta"):
        META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in DatasetCatalog


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_says_where_it_comes_from_and_is_short(leaf):
    lines = (CONFIGS / leaf).read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40
    assert not any(len(line) > 110 for line in lines)
    # Without a base, a leaf would silently build the defaults.
    assert sum(line.startswith("_BASE_: ") for line in lines) == 1


METRICS = {"gIoU", "cIoU", "N_acc", "oIoU", "mIoU", "Pr@0.9", "mIoU/seen", "mIoU/unseen"}


@pytest.mark.parametrize("row", ROWS)
def test_row_says_what_it_is_and_what_was_published(row):
    own = read_paper_row(str(CONFIGS / row))
    assert own.paper or own.note.startswith(("No table row", "Not "))
    for dataset, metrics in own.published.items():
        assert dataset in DatasetCatalog and metrics.keys() <= METRICS
        assert all(isinstance(value, float) and 0 < value < 100 for value in metrics.values())


@pytest.mark.parametrize(
    "config, units, iterations, steps",
    [
        # Units are the published counts of sentences (ASDA, gRefCOCO) and referents.
        ("asda_clip_vit_b.yaml", 120_624, 137_856, (77_544, 120_624)),
        ("papers/asda.yaml:refcocog_umd_section_4_2", 80_512, 86_263, (51_758, 71_886)),
        ("papers/asda.yaml:t3_layers_1", 120_624, 43_080, ()),
        ("deris_swin_s.yaml", 126_908, 39_659, (27_762, 35_693)),
        ("deris_swin_b_grefcoco.yaml", 209_344, 19_626, (16_355,)),
        ("risam_sam_vit_h.yaml", 42_404, 66_257, (39_754, 55_656)),
        ("papers/risam.yaml:grefcoco", 209_344, 327_100, (196_260, 274_764)),
        ("papers/risam.yaml:epochs_of_images", 16_994, 106_213, (63_728, 89_219)),
        ("shared_ris_beit3_b.yaml", 42_404, 13_252, ()),
        ("papers/shared_ris.yaml:every_sentence", 120_624, 37_695, ()),
        ("vipa_swin_b.yaml", 42_404, 106_010, ()),
        ("papers/vipa.yaml:referit", 54_127, 135_318, ()),
    ],
)
def test_recipes_last_as_long_as_published(config, units, iterations, steps):
    solver = with_iterations(load_config(str(CONFIGS / config)), units).SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (iterations, steps)
    assert solver.WARMUP_ITERS == (1_983 if config == "deris_swin_s.yaml" else 0)


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if "/" not in leaf])
def test_published_recipes_count_in_epochs(leaf):
    assert load_config(str(CONFIGS / leaf)).SOLVER.RIS.EPOCHS > 0


class Recorder(CfgNode):
    """A config that remembers which of its leaves were read."""

    seen: set[str] = set()

    @classmethod
    def of(cls, cfg, path=()):
        node = cls(new_allowed=True)
        for key, value in cfg.items():
            node[key] = cls.of(value, (*path, key)) if isinstance(value, CfgNode) else value
        node.__dict__["path"] = path
        return node

    def __getattr__(self, name):
        value = super().__getattr__(name)
        if name in self:
            Recorder.seen.add(".".join((*self.__dict__.get("path", ()), name)))
        return value


def leaves(cfg, path=()):
    for key, value in cfg.items():
        if isinstance(value, CfgNode) and value:
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


@pytest.mark.parametrize("method", ["asda", "deris", "risam", "shared_ris", "vipa"])
def test_a_method_adds_its_own_node_alone(method):
    cfg, stock = get_cfg(), dict(leaves(get_cfg()))
    getattr(import_module(f"ris_d2.modeling.{method}.config"), f"add_{method}_config")(cfg)
    added = {key: value for key, value in leaves(cfg) if stock.get(key) != value}
    assert len(added) > 10 and all(key.startswith(f"MODEL.{method.upper()}.") for key in added)


def test_every_key_is_read(tmp_path, monkeypatch):
    """Build everything that a training and an evaluation build, and see which keys were asked for."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    refshapes.write(str(tmp_path / "refshapes"), {"train": 2, "val": 1}, refshapes.Options())
    stock = dict(leaves(get_cfg()))
    ours = {key for key, value in leaves(get_ris_cfg()) if key not in stock or stock[key] != value}
    # set by get_ris_cfg, read by detectron2
    ours -= {"MODEL.DEVICE"}
    Recorder.seen = set()
    register_from_config(Recorder.of(get_ris_cfg()))
    for schedule, optimizer in (("cosine", "AdamW"), ("poly", "Muon")):
        cfg = load_config(str(CONFIGS / "instant_test" / "shared_ris.yaml"))
        cfg.SOLVER.RIS.SCHEDULE, cfg.OUTPUT_DIR = schedule, str(tmp_path / schedule)
        cfg.SOLVER.RIS.OPTIMIZER = optimizer
        cfg.DATALOADER.NUM_WORKERS = 0
        trainer = Trainer(Recorder.of(cfg))
    Trainer.build_evaluator(trainer.cfg, "ris_grefshapes_val")
    cfg = get_ris_cfg()
    cfg.INPUT.RIS.GEOMETRY, cfg.INPUT.RIS.AFFINE.ENABLED = "letterbox", True
    build_augmentations(Recorder.of(cfg), is_train=True)
    for name in ("RISCLIPText", "RISBert"):
        cfg = get_ris_cfg()
        cfg.MODEL.RIS.TEXT.NAME = name
        build_text_encoder(Recorder.of(cfg))
    DeRIS.from_config(Recorder.of(load_config(str(CONFIGS / "instant_test" / "deris.yaml"))))
    RISCausalLM.from_config(Recorder.of(get_ris_cfg()))
    ASDA.from_config(Recorder.of(load_config(str(CONFIGS / "instant_test" / "asda.yaml"))))
    RISAM.from_config(Recorder.of(load_config(str(CONFIGS / "instant_test" / "risam.yaml"))))
    RISViT.from_config(Recorder.of(get_ris_cfg()))
    for options in ([], ["MODEL.VIPA.KEY_VALUES", "language"]):
        VIPA.from_config(
            Recorder.of(load_config(str(CONFIGS / "instant_test" / "vipa.yaml"), options))
        )
    assert ours - Recorder.seen == set()


def test_former_keys_of_a_written_config_are_passed_over(tmp_path, caplog):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {RIS: {BEIT3: {MLP_RATIO: 4, DEPTH: 3}}, ASDA: {UPSAMPLING: direct}}\n")
    assert load_config(str(path)).MODEL.RIS.BEIT3.DEPTH == 3
    assert "MODEL.RIS.BEIT3.MLP_RATIO" in caplog.text and "MODEL.ASDA.UPSAMPLING" in caplog.text
