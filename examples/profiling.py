"""Where does the time go? ``torch.profiler`` around a few steps, with a trace file per rank for Perfetto."""

import argparse

import torch

from shardwise import Accelerator
from shardwise.utils import ProfileKwargs, set_seed
from toy import Classifier, loaders, loss_of


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", default="traces", help="a folder for the trace files")
    options = parser.parse_args(argv)

    settings = ProfileKwargs(activities=["cpu"], record_shapes=True, output_trace_dir=options.traces)
    accelerator = Accelerator(kwargs_handlers=[settings])
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, _ = loaders()
    model, optimizer, training = accelerator.prepare(model, optimizer, training)

    with accelerator.profile() as profiler:
        for _, batch in zip(range(3), training, strict=False):
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=8)
    accelerator.print(table)
    return table


if __name__ == "__main__":
    main()
