import json
import logging
import os
import pickle
import sys
import threading
import zlib

import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ris_d2 import get_ris_cfg
from ris_d2.data import cache
from ris_d2.data.cache import MappedRecords, cached, ref_ids
from ris_d2.data.catalog import annotation_files, load_records
from ris_d2.data.loader import build_test_loader, build_train_loader
from ris_d2.data.units import build_units

TRAIN = "ris_grefcoco_unc_train_full"


@pytest.fixture
def folder(dataset_files, tmp_path, monkeypatch):
    """An empty cache for the smallest of files, beside gRefCOCO and RefCOCO."""
    dataset_files.refs.append(dataset_files.ref(5, ann_id=40, image_id=4, split="testB"))
    dataset_files.write_refer()
    dataset_files.write_grefer()
    monkeypatch.setattr(cache, "_SMALL", 0)
    monkeypatch.setenv("RIS_D2_CACHE", str(tmp_path / "cache" / "records"))
    return tmp_path / "cache" / "records"


def read():
    return load_records([TRAIN], drop_eval_images=True)


def fail():
    raise AssertionError("read again")


def ask(read=read, **options):
    return cached(read, [TRAIN], annotation_files([TRAIN]), **options)


def test_records_are_read_once_and_stay_the_same(folder):
    first, again = ask(), ask(fail)
    assert isinstance(again, MappedRecords) and len(again) == 3
    assert list(first) == list(again) == read()
    assert type(again[0]["annotations"][0]["bbox_mode"]) is BoxMode
    assert again[-1] == first[2]
    with pytest.raises(IndexError):
        again[3]
    for unit in ("sentence", "referent", "image"):
        assert list(build_units(again, unit)) == list(build_units(read(), unit))
    assert ref_ids(again) == ref_ids(read())
    assert [file.suffix for file in folder.iterdir()] == [".records"]


def test_workers_that_are_not_forked_map_the_file_too(folder):
    records = ask()
    copy = pickle.loads(data := pickle.dumps(records))
    assert list(copy) == list(records) and len(data) < 2000


def test_other_options_are_another_file(folder):
    ask(drop=True)
    assert ask(lambda: [], drop=False) != ask(fail, drop=True)
    assert len(list(folder.iterdir())) == 2


def test_a_changed_source_is_read_again(folder, dataset_files, caplog):
    ask()
    for ref in dataset_files.grefs:
        ref["sentences"][0]["raw"] = "something else"
    dataset_files.write_grefer()
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        records = ask()
    assert caplog.text.count("made of other annotation files") == 1
    assert list(records) == list(ask(fail)) == read()
    assert records[0]["expressions"][0]["text"] == "something else"
    assert len(list(folder.iterdir())) == 1


def test_changed_code_reads_again(folder, monkeypatch):
    ask()
    monkeypatch.setattr(cache, "_code_version", lambda: 7)
    with pytest.raises(AssertionError, match="read again"):
        ask(fail)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x"])
def test_a_truncated_file_is_made_anew(folder, damage, caplog):
    ask()
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        assert list(ask()) == list(ask(fail)) == read()
    assert caplog.text.count("it is made anew") == 1 and str(path) in caplog.text


def test_a_flipped_bit_is_noticed(folder):
    ask()
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    assert list(ask()) == list(ask(fail)) == read()


class Hostile:
    def __reduce__(self):
        return os.system, ("false",)


def test_nothing_that_a_file_names_is_run(folder):
    key = ask()._arguments[1]
    (path,) = folder.iterdir()
    body = pickle.dumps(Hostile())
    crc = zlib.crc32(body)
    index = {"key": key, "crc32": crc, "bounds": [0, len(body)], "ref_ids": [[1]]}
    encoded = json.dumps(index).encode()
    path.write_bytes(body + encoded + len(encoded).to_bytes(8, "little"))
    with pytest.raises(pickle.UnpicklingError, match="system"):
        ask(fail)[0]


def test_a_folder_that_cannot_be_written_means_no_cache(folder, caplog):
    folder.parent.write_text("a file in its place")
    with caplog.at_level(logging.INFO, logger="ris_d2"):
        assert type(ask()) is list and ask() == read()
    assert caplog.text.count("no cache") == 1


def test_no_cache_where_it_is_switched_off_or_not_worth_it(folder, monkeypatch):
    monkeypatch.setattr(cache, "_SMALL", 10_000_000)
    assert ask() == read()
    monkeypatch.setattr(cache, "_SMALL", 0)
    monkeypatch.setenv("RIS_D2_CACHE", "")
    assert ask() == read() and not folder.exists()


def test_only_what_comes_from_published_files_alone_is_kept():
    for name in ("my_own", "ris_refclef_unc_train", "ris_refcoco_unc_train_seen"):
        assert annotation_files(["ris_refcoco_unc_train", name]) == []
    assert len(annotation_files([TRAIN])) == 4


def test_processes_take_turns_and_one_reads(folder):
    # A lock belongs to an opened folder, so threads wait as processes do.
    reads, started = [], threading.Event()

    def slow():
        reads.append(started.wait(2))
        return read()

    threads = [threading.Thread(target=ask, args=(slow,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join()
    assert reads == [True] and list(ask(fail)) == read()


def test_loaders_give_the_same_from_the_cache(folder, tokenizer, monkeypatch):
    cfg = get_ris_cfg()
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = (TRAIN,), 5, 0
    cfg.SOLVER.IMS_PER_BATCH = 2

    def some():
        train = iter(build_train_loader(cfg, mapper=lambda record, rng: record))
        test = build_test_loader(cfg, "ris_grefcoco_unc_val", mapper=lambda record: record)
        return [next(train) for _ in range(6)], list(test)

    read_at_once = some()
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(DatasetCatalog, "get", fail)
    assert some() == read_at_once


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_fifty_thousand_units_take_no_memory(folder):
    def private():
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private"))

    records = ask()
    list(records)
    before = private()
    for draw in range(50_000):
        records[draw % 3]
    assert private() - before < 2000  # kB
