"""transformers' Trainer trains by Shardwise: the numbers of one plain process on the whole batch."""

from __future__ import annotations

import pytest
import torch

from models import PRESETS
from ranks import everywhere, run
from slowly import slow

pytest.importorskip("accelerate")  # transformers' Trainer asks for it
pytest.importorskip("transformers")


def close(found, wanted, tolerance=2e-5):
    (losses, values), (plain, truth) = found, wanted
    assert losses == pytest.approx(plain, rel=tolerance)
    for name, value in truth.items():
        torch.testing.assert_close(values[name], value, rtol=1e-3, atol=tolerance)


def trained(folder, strategy, count, accumulation, changes=None):
    import trainer_models as tm

    made = tm.trainer(
        folder, tm.data(count), strategy=strategy, gradient_accumulation_steps=accumulation, **(changes or {})
    )
    made.train()
    return tm.history(made), tm.values(made.model)


def plain(*args, **kwargs):
    import trainer_models as tm

    return tm.alone(*args, **kwargs)


def rows(count):
    import trainer_models as tm

    return tm.data(count)


@pytest.mark.parametrize("ranks", [slow(1), 2, slow(4)])
@pytest.mark.parametrize("strategy", PRESETS)
def test_the_mean_over_tokens_is_that_of_one_process(tmp_path, strategy, ranks):
    # 20 rows in windows of 8: the last one of an epoch has 4, of 4, 2 or 1 micro-batches.
    found = everywhere(ranks, trained, str(tmp_path), strategy, 20, 8 // ranks)
    for one in found:
        close(one, plain(rows(20), 8))


@pytest.mark.parametrize("strategy", [slow("ddp"), slow("zero1"), "zero2", slow("zero3")])
def test_each_rank_for_itself_is_the_mean_of_means(tmp_path, strategy):
    found = run(2, trained, str(tmp_path), strategy, 16, 2, {"average_tokens_across_devices": False})
    for one in found:
        close(one, plain(rows(16), 4, ranks=2))
