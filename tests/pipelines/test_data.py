import bz2
import hashlib
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowra_pipelines.config_sections import DataConfig
from flowra_pipelines.data import load_text_data
from flowra_pipelines.errors import UserError
from flowra_pipelines.sources import content_hash, resolve
from flowra_testing.tiny_runs import write_reviews, write_scores


def reviews(tmp_path: Path) -> DataConfig:
    return DataConfig(train=str(write_reviews(tmp_path / "reviews.csv")), label="category", labels=("rotten", "fresh"))


def test_other_labels_and_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load_text_data(reviews(tmp_path), label="class")
    reasons = data.left_out
    assert reasons["the label is not one of rotten, fresh"] == 1
    assert reasons["the text has been seen before"] >= 2
    texts = [row["text"] for row in (*data.train, *data.test)]
    assert len(texts) == len(set(texts))
    assert len(texts) + sum(reasons.values()) == 243
    assert data.labels == ("rotten", "fresh")


def test_the_test_part_is_chosen_by_the_hash_of_the_text_alone(tmp_path: Path) -> None:
    data = load_text_data(reviews(tmp_path), label="class")
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
    data = load_text_data(DataConfig(train=str(path)), label="class")
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
        ({"train": "reviews.txt"}, "data must be a file ending in one of"),
        (
            {"test_fraction": 1e-9},
            r"data must leave at least 1 training and 2 test rows, got 2\d+ and 0; left out: 1 be",
        ),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    base = reviews(tmp_path)
    (tmp_path / "reviews.txt").write_text("x")
    changes = {key: str(tmp_path / value) if key == "train" else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message) as caught:
        load_text_data(base.model_copy(update=changes), label="class")
    assert "\n" not in str(caught.value)


def written(folder: Path, columns: dict[str, list[Any]]) -> str:
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def texts(count: int) -> list[str]:
    return [f"text {index}" for index in range(count)]


# classes


def test_a_label_that_is_not_a_class_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": texts(3), "label": [0.1, 0.2, 0.3]})
    with pytest.raises(UserError, match=r"column 'label' must hold classes, got 0\.1; in .*model\.task=regression"):
        load_text_data(DataConfig(train=source), label="class")


def test_whole_numbers_with_a_gap_are_classes(tmp_path: Path) -> None:
    lines = [f"text {index},{index % 2 if index else ''}" for index in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    data = load_text_data(DataConfig(train=str(tmp_path / "rows.csv")), label="class")
    assert data.labels == ("0", "1")
    assert data.left_out == {"a column is empty": 1}


def test_a_class_feature_is_read_by_name_and_minus_one_is_no_class(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"text": texts(40), "label": [index % 2 for index in range(39)] + [-1]},
        features=datasets.Features({
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }),
    )
    table.to_parquet(tmp_path / "rows.parquet")
    data = load_text_data(DataConfig(train=str(tmp_path / "rows.parquet")), label="class")
    assert data.labels == ("no", "yes")
    assert data.left_out == {"a column is empty": 1}
    assert {(row["text"], data.labels[row["label"]]) for row in data.train} <= {
        (f"text {index}", ("no", "yes")[index % 2]) for index in range(39)
    }


def test_a_class_without_training_rows_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path, {"text": texts(4), "label": ["a", "a", "b", "b"]})
    pq.write_table(pa.table({"text": ["x", "y"], "label": ["a", "c"]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="every class must have training rows, got none of 'c'"):
        load_text_data(DataConfig(train=train, test=str(tmp_path / "test.parquet")), label="class")


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": texts(3), "label": ["a"] * 3})
    with pytest.raises(UserError, match=r"column 'label' must hold at least two classes, got only \['a'\]"):
        load_text_data(DataConfig(train=source), label="class")


def test_the_label_summary_counts_the_training_rows_of_each_class(tmp_path: Path) -> None:
    data = load_text_data(reviews(tmp_path), label="class")
    counts = [sum(row["label"] == index for row in data.train) for index in range(2)]
    assert data.label_summary == f"rotten {counts[0]}, fresh {counts[1]}"
    assert data.numbers is None


# numbers


def test_numbers_are_read_from_whole_numbers_floats_decimals_and_text(tmp_path: Path) -> None:
    for column in (
        [1, 2, 3, 4],
        [1.0, 2.0, 3.0, 4.0],
        [Decimal(each) for each in (1, 2, 3, 4)],
        ["1", "2.0", " 3", "4e0"],
    ):
        source = written(tmp_path, {"text": texts(4), "label": column})
        data = load_text_data(DataConfig(train=source, test=source), label="number")
        assert data.train == data.test
        assert {row["text"]: row["label"] for row in data.train} == {f"text {index}": index + 1.0 for index in range(4)}
        assert data.labels == ()


def test_mean_and_deviation_are_those_of_the_training_rows_alone(tmp_path: Path) -> None:
    data = load_text_data(DataConfig(train=str(write_scores(tmp_path / "s.csv")), label="score"), label="number")
    labels = [row["label"] for row in data.train]
    assert data.numbers is not None
    assert data.numbers.mean == pytest.approx(np.mean(labels), rel=1e-12)
    assert data.numbers.deviation == pytest.approx(np.std(labels), rel=1e-12)
    assert (data.numbers.low, data.numbers.high) == (min(labels), max(labels))
    assert data.label_summary == str(data.numbers)
    assert data.label_summary.startswith(f"mean {data.numbers.mean:.4g}, standard deviation ")


def test_duplicates_and_the_held_out_part_do_not_depend_on_the_kind_of_label(tmp_path: Path) -> None:
    rows = [(f"text {index % 50}", float(index % 7)) for index in range(80)]
    source = written(tmp_path, {"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    numbers = load_text_data(DataConfig(train=source), label="number")
    classes = load_text_data(DataConfig(train=source), label="class")
    assert numbers.left_out == classes.left_out == {"the text has been seen before": 30}
    for part in ("train", "test"):
        assert [row["text"] for row in getattr(numbers, part)] == [row["text"] for row in getattr(classes, part)]


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (["1", "2", "n/a"], "'n/a'"),
        ([1.0, 2.0, float("nan")], "nan"),
        ([1.0, 2.0, float("inf")], "inf"),
        ([1.0, 2.0, 1e30], r"1e\+30"),
        (["1", "nan", "2"], "'nan'"),
        ([True, False, True], "True"),
        ([[1.0], [2.0], [3.0]], r"\[1\.0\]"),
    ],
    ids=["text", "nan", "infinite", "huge", "text of nan", "truth", "list"],
)
def test_a_label_that_is_no_number_is_refused_with_its_value_and_column(
    tmp_path: Path, column: list[Any], shown: str
) -> None:
    source = written(tmp_path, {"text": texts(3), "score": column})
    with pytest.raises(UserError, match=rf"column 'score' must hold numbers within ±1e\+18, got {shown}; in") as caught:
        load_text_data(DataConfig(train=source, label="score"), label="number")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("column", "part"), [([3.0] * 4, "training"), ([3.0, 3.0, 1.0, 2.0], "test")])
def test_numbers_that_are_all_the_same_are_refused(tmp_path: Path, column: list[float], part: str) -> None:
    first = sorted(texts(4), key=lambda text: hashlib.sha1(text.encode()).hexdigest())  # the first are held out
    share = (int(hashlib.sha1(first[1].encode()).hexdigest()[:8], 16) + 1) / 2**32
    source = written(tmp_path, {"text": first, "label": column})
    with pytest.raises(UserError, match=f"column 'label' must hold different numbers, got only 3 in the {part} rows"):
        load_text_data(DataConfig(train=source, test_fraction=share), label="number")


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
