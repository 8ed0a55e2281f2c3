"""Rows of papers' tables as configurations."""

import pytest

from ris_d2 import load_config
from ris_d2.paper_tables import is_paper_row, read_paper_row, row_names

TABLE = """
base: recipe.yaml
rows:
  base: {paper: Table 1, published: {ris_refcoco_unc_val: {oIoU: 75.0}}}
  wide: {paper: Table 2, set: {SOLVER.BASE_LR: 0.5, INPUT.RIS.SIZE: [64, 96]}, note: ours}
  wide_and_long: {like: wide, set: {SOLVER.BASE_LR: 0.25, SOLVER.MAX_ITER: 9}}
  large: {base: large.yaml, like: wide}
  fast: {set: {SOLVER.BASE_LR: 2.0}}
  both: {like: [large, fast]}
"""


@pytest.fixture
def table(tmp_path):
    (tmp_path / "recipe.yaml").write_text("SOLVER: {BASE_LR: 1.0, IMS_PER_BATCH: 4}\n")
    (tmp_path / "large.yaml").write_text("_BASE_: recipe.yaml\nSOLVER: {IMS_PER_BATCH: 8}\n")
    path = tmp_path / "paper.yaml"
    path.write_text(TABLE)
    return str(path)


def solver(table, row, *options):
    cfg = load_config(f"{table}:{row}", options)
    return cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.INPUT.RIS.SIZE


def test_row_changes_its_recipe(table):
    assert solver(table, "base") == (1.0, 4, 40000, (480, 480))
    assert solver(table, "wide") == (0.5, 4, 40000, (64, 96))
    assert solver(table, "wide_and_long") == (0.25, 4, 9, (64, 96))
    assert solver(table, "large") == (0.5, 8, 40000, (64, 96))
    assert solver(table, "both") == (2.0, 8, 40000, (64, 96))
    assert solver(table, "large", "SOLVER.BASE_LR", "2.0")[0] == 2.0


def test_row_says_what_was_published(table):
    assert row_names(table) == ["base", "wide", "wide_and_long", "large", "fast", "both"]
    row = read_paper_row(f"{table}:base")
    assert row.paper == "Table 1" and row.published == {"ris_refcoco_unc_val": {"oIoU": 75.0}}
    assert read_paper_row(f"{table}:wide").note == "ours"
    # What a row is like has its own numbers.
    assert read_paper_row(f"{table}:wide_and_long").paper == ""


def test_paths_with_colons_are_no_rows():
    assert is_paper_row("configs/papers/vipa.yaml:t7")
    assert not is_paper_row("configs/vipa.yaml")
    assert not is_paper_row("a.yaml:b/c.yaml")


@pytest.mark.parametrize(
    "text, row, message",
    [
        (TABLE, "tall", "no row 'tall'; the rows are base, wide"),
        ("base: recipe.yaml\nrows: {a: {like: b}, b: {like: a}}", "a", "row b is like 'a'"),
        ("base: recipe.yaml\nrows: {a: {like: b}}", "a", "row a is like 'b'"),
        ("base: recipe.yaml\nrows: {a: {sets: {}}}", "a", "row a has other fields"),
        ("base: recipe.yaml\nrows: {a: {set: [1]}}", "a", "set and published are mappings"),
        ("rows: {a: {}}", "a", "a table has base"),
        ("base: recipe.yaml\nrows: {a: {set: {SOLVER.RATE: 1}}}", "a", "unknown key SOLVER.RATE"),
    ],
)
def test_mistakes_name_table_and_row(table, text, row, message):
    with open(table, "w") as file:
        file.write(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(f"{table}:{row}")
    assert "paper.yaml" in str(error.value)


def test_recipe_that_is_not_there(table, tmp_path):
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="paper.yaml:base: base names .*recipe.yaml"):
        load_config(f"{table}:base")
