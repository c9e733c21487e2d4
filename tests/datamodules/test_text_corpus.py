"""Lines come from files, saved copies or the hub.

If there are none, an error says so.
"""

from pathlib import Path

import pytest

from datamodules.text_corpus import SPLITS, open_corpus
from tests.helpers.commands import fresh_python
from tests.helpers.text import FILES, lines, write_corpus


def test_text_files_are_read_line_by_line_as_they_stand(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path))
    text = corpus.read()
    assert text["train"] == lines(20, seed=0) and text["validation"] == lines(5, seed=1)
    assert list(text) == list(SPLITS)


def test_only_ends_of_lines_end_a_line(tmp_path: Path) -> None:
    """Python's splitlines also splits at other characters."""
    write_corpus(tmp_path)
    text = ["form\x0cfeed", "next\x85line and\u2028separator", "", " last, without an end "]
    (tmp_path / FILES["test"]).write_text("\n".join(text), encoding="utf-8")
    assert open_corpus(tmp_path).read()["test"] == text


def test_parquet_files_and_a_saved_copy_give_the_same_lines(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = open_corpus(write_corpus(tmp_path / "text")).read()
    # As on the hub, where an entry may keep the end of its line.
    copy = DatasetDict({split: Dataset.from_dict({"text": [f"{x}\n" for x in texts[split]]}) for split in SPLITS})
    (tmp_path / "parquet").mkdir()
    for split in SPLITS:
        copy[split].to_parquet(str(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"))
    copy.save_to_disk(str(tmp_path / "saved"))
    for folder in ("parquet", "saved"):
        corpus = open_corpus(tmp_path / folder)
        assert corpus.read() == texts and corpus.source != open_corpus(tmp_path / "text").source


def test_the_digest_depends_on_the_text_only(tmp_path: Path) -> None:
    digests = [open_corpus(write_corpus(tmp_path / name)).digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    with (tmp_path / "b" / FILES["validation"]).open("a") as file:
        file.write("one line more\n")
    assert open_corpus(tmp_path / "b").digest != digests[0]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the corpus folder .*nowhere is missing"):
        open_corpus(tmp_path / "nowhere")


def test_a_split_without_a_file_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / FILES["test"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"no file named \*test\* for the test split"):
        open_corpus(tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "wiki.train.raw").write_text("more\n")
    with pytest.raises(ValueError, match="2 files named"):
        open_corpus(tmp_path)


def test_a_saved_copy_without_a_split_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="lacks the split validation, it has train"):
        open_corpus(tmp_path / "saved")


@pytest.mark.slow
def test_without_network_and_copy_one_line_names_the_remedy(tmp_path: Path) -> None:
    """The real loader is offline, because of a variable that it reads on import."""
    result = fresh_python(
        *(
            "train.py",
            "fit",
            "--config",
            "configs/wikitext2_nano_base.yaml",
            "--runs",
            tmp_path / "runs",
            "--wandb",
            "false",
        ),
        home=tmp_path,
        **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert "could not be loaded from the hub" in result.error and "--data.root" in result.error
    assert not list((tmp_path / "runs").glob("*/*"))
