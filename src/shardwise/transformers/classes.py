"""transformers' own classes, with the mixins before them."""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from shardwise.transformers.arguments import ShardwiseArguments
from shardwise.transformers.mixin import ShardwiseMixin


@dataclass
class TrainingArguments(ShardwiseArguments, transformers.TrainingArguments):
    """``transformers.TrainingArguments`` with ``strategy``; see :class:`ShardwiseArguments`."""


@dataclass
class Seq2SeqTrainingArguments(ShardwiseArguments, transformers.Seq2SeqTrainingArguments):
    """``transformers.Seq2SeqTrainingArguments`` with ``strategy``; see :class:`ShardwiseArguments`."""


class Trainer(ShardwiseMixin, transformers.Trainer):
    """``transformers.Trainer`` that trains under a strategy; see :class:`ShardwiseMixin`."""


class Seq2SeqTrainer(ShardwiseMixin, transformers.Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` that trains under a strategy; see :class:`ShardwiseMixin`."""
