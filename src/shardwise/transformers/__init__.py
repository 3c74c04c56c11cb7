"""``Trainer`` of transformers, trained by Shardwise.

::

    from shardwise.transformers import Trainer, TrainingArguments

    args = TrainingArguments("out", strategy="zero3", per_device_train_batch_size=8, bf16=True)
    Trainer(model, args, train_dataset=data).train()

The classes are transformers' own with :class:`ShardwiseMixin` and :class:`ShardwiseArguments` before them. Subclasses
of ``Trainer`` that others wrote take the same two::

    class MySFTTrainer(ShardwiseMixin, SFTTrainer): ...

    class MySFTConfig(ShardwiseArguments, SFTConfig): ...

Raises:
    ImportError: transformers is not installed, or is another version than the ones this was written for.
"""

from shardwise.transformers.arguments import ShardwiseArguments
from shardwise.transformers.classes import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from shardwise.transformers.mixin import ShardwiseMixin

__all__ = [
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "ShardwiseArguments",
    "ShardwiseMixin",
    "Trainer",
    "TrainingArguments",
]
