"""Augmentations that keep a record's answer right: functions (record, draw) -> record, for `env.augment`."""

import dataclasses
import random
import re

from .record import Record

# Between two facts of a question's context, each "The ... of ... is ....".
_BETWEEN = re.compile(r"(?<=\.) (?=The )")


def shuffle_facts(record: Record, draw: random.Random) -> Record:
    """A question of the question-answering task with the facts of its context in another order.

    Args:
        record: its prompt is `FACT. FACT. ...\\nQ: ...`; any other is returned as it is.
        draw: source of the order.
    """
    if not isinstance(record.prompt, str):
        return record
    context, question, rest = record.prompt.partition("\nQ:")
    facts = _BETWEEN.split(context)
    if not question or len(facts) < 2:
        return record
    draw.shuffle(facts)
    return dataclasses.replace(record, prompt=" ".join(facts) + question + rest)
