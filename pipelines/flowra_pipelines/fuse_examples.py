"""What gates are trained on and measured on: tokens, and which of them are to be predicted."""

from collections.abc import Sequence
from typing import Any

from flowra_pipelines.config_sections import DataConfig
from flowra_pipelines.data import Examples, Row, load_text_data, tokenise
from flowra_pipelines.errors import UserError
from flowra_pipelines.fuse_setting import FusedSetting
from flowra_pipelines.task_statistics import data_source

__all__ = ["read_examples"]

DEFAULT_LABEL = "label"


def read_examples(
    setting: FusedSetting,
    data: str,
    *,
    validation: str | float,
    max_length: int,
    label: str,
    labels: Sequence[str] | None,
) -> tuple[Examples, Examples, dict[str, int]]:
    """Read and tokenise what is trained on and what is measured on.

    Args:
        setting: task and tokenizer.
        data: ``FILE[:COLUMN[,COLUMN]]``; two columns of a language model are prompt and response.
        validation: a file with the same columns, or the share of rows that is held out.
        max_length: tokens of an example; longer ones are cut.
        label: column with the class or number, for what is no language model.
        labels: classes, in the order of the head's outputs.

    Returns:
        Examples of training and of validation, and reason to number of rows that were left out.

    Raises:
        UserError: if the data cannot be read, have other classes than the head, or nothing to predict.
    """
    kind = setting.task.label
    if kind is None and (labels is not None or label != DEFAULT_LABEL):
        raise UserError("label and labels must be left out with a language model, which predicts the text itself")
    given = data_source(data)
    held_out = {"test": validation} if isinstance(validation, str) else {"test": None, "test_fraction": validation}
    said: dict[str, Any] = {**given.model_dump(), **held_out, "label": label, "labels": labels}
    read = load_text_data(DataConfig(**said), label=kind)
    outputs = setting.model.config.num_labels
    if kind == "class" and len(read.labels) != outputs:
        raise UserError(
            f"labels must be the {outputs} classes of the head, got {', '.join(read.labels)}. Name them in the order of"
            " its outputs with --labels."
        )
    length = min(max_length, setting.context or max_length)
    left_out = dict(read.left_out)
    parts = []
    for rows in (read.train, read.test):
        if setting.task.peft_type == "CAUSAL_LM" and given.text_pair is not None:
            made = _answers(rows, setting, length)
        else:
            made = tokenise(rows, setting.tokenizer, max_length=length)
        learned = [row.get("response", [1] * len(row["input_ids"])) for row in map(made.__getitem__, range(len(made)))]
        kept = [index for index, each in enumerate(learned) if kind is not None or any(each[1:])]
        if len(kept) < len(rows):
            reason = f"there is no token to predict within {length}"
            left_out[reason] = left_out.get(reason, 0) + len(rows) - len(kept)
        if not kept:
            raise UserError(f"data must hold rows with a token to predict within {length}, got none; in {data}")
        parts.append(made.select(kept))
    return parts[0], parts[1], left_out


def _answers(rows: Sequence[Row], setting: FusedSetting, length: int) -> Examples:
    """Put a response and the end of text after each prompt, as generation will, and mark what is a target."""
    prompts: Any = setting.tokenizer([row["text"] for row in rows])["input_ids"]
    answers: Any = setting.tokenizer([row["text_pair"] for row in rows], add_special_tokens=False)["input_ids"]
    end = setting.tokenizer.eos_token_id
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = [*answer, *([] if end is None else [end])]
        ids = [*prompt, *whole][:length]
        response = [*([0] * len(prompt)), *([1] * len(whole))][:length]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "response": response})
    return Examples(made)
