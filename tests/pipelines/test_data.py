import bz2
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowra_pipelines.data import load_text_data
from flowra_pipelines.errors import UserError
from flowra_pipelines.run_config import DataConfig
from flowra_pipelines.sources import content_hash, resolve
from flowra_testing.tiny_runs import write_reviews


def reviews(tmp_path: Path) -> DataConfig:
    return DataConfig(train=str(write_reviews(tmp_path / "reviews.csv")), label="category", labels=("rotten", "fresh"))


def test_other_labels_and_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load_text_data(reviews(tmp_path), labelled=True)
    reasons = data.left_out
    assert reasons["the label is not one of rotten, fresh"] == 1
    assert reasons["the text has been seen before"] >= 2
    texts = [row["text"] for row in (*data.train, *data.test)]
    assert len(texts) == len(set(texts))
    assert len(texts) + sum(reasons.values()) == 243
    assert data.labels == ("rotten", "fresh")


def test_the_test_part_is_chosen_by_the_hash_of_the_text_alone(tmp_path: Path) -> None:
    data = load_text_data(reviews(tmp_path), labelled=True)
    for row in data.test:
        assert int(hashlib.sha1(row["text"].encode()).hexdigest()[:8], 16) / 2**32 < 0.2
    for row in data.train:
        assert int(hashlib.sha1(row["text"].encode()).hexdigest()[:8], 16) / 2**32 >= 0.2


@pytest.mark.parametrize("kind", ["csv.bz2", "json", "jsonl", "parquet"])
def test_formats_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"text {index}", "label": "ab"[index % 2]} for index in range(40)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv.bz2":
        lines = "\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)])
        path.write_bytes(bz2.compress(lines.encode()))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_text_data(DataConfig(train=str(path)), labelled=True)
    found = sorted((row["text"], data.labels[row["label"]]) for row in (*data.train, *data.test))
    assert found == sorted((row["text"], row["label"]) for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "stars"}, r"column must be one of \['category', 'text'\], got 'stars'"),
        (
            {"label": "category", "labels": ("good", "bad")},
            r"data\.labels must be at least two of .*got \['good', 'bad'\]",
        ),
        ({"train": "nowhere.csv"}, r"file must exist, got '.*nowhere\.csv'"),
        ({"train": "reviews.txt"}, "data file must end in one of"),
        ({"test_fraction": 1e-9}, r"data must leave training and test rows, got \d+ and 0"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    base = reviews(tmp_path)
    (tmp_path / "reviews.txt").write_text("x")
    changes = {key: str(tmp_path / value) if key == "train" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        load_text_data(base.model_copy(update=changes), labelled=True)
    assert "\n" not in str(caught.value)


def test_a_label_that_is_not_a_class_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [0.1, 0.2, 0.3]}), tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=r"column 'label' must hold classes, got 0\.1"):
        load_text_data(DataConfig(train=str(tmp_path / "scores.parquet")), labelled=True)


def test_a_package_source_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "exploding_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "data" / "file.csv").write_text("text\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("package://exploding_package/data/file.csv") == package / "data" / "file.csv"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package://no_such_package/x", "package must be installed.*pip install --no-deps no-such-package"),
        ("package://flowra_pipelines/../secret", "package source must be package://NAME/path inside it"),
        ("package://flowra_pipelines/nothing.csv", "file must exist"),
    ],
)
def test_a_package_source_that_is_not_there_is_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(source)


def test_a_name_that_is_not_a_file_is_left_to_the_hub() -> None:
    assert resolve("stanfordnlp/imdb") is None
    assert resolve("org/model-v1.5") is None


def test_the_content_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = content_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(tmp_path) != first
    (tmp_path / "b").rename(tmp_path / "a")
    assert content_hash(tmp_path) == first
