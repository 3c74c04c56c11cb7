"""Save in the middle of an epoch, and go on from there in another run, with the batches that were left.

python examples/checkpoint_and_resume.py --folder /tmp/run --stop-after 20
python examples/checkpoint_and_resume.py --folder /tmp/run
shardwise launch -n 2 --max-restarts 3 examples/checkpoint_and_resume.py --folder /tmp/run2 --background

The second run takes up the newest complete checkpoint: model, optimizer, scheduler, random states, and the place in
the data. Its losses are those of a run that was never stopped. In the third, training goes on while a checkpoint is
written, and a rank that is killed costs the steps since the last complete one.
"""

import argparse

import torch

from shardwise import Accelerator
from shardwise.utils import ProjectConfiguration, set_seed
from toy import Classifier, loaders, loss_of


class Progress:
    """Anything with ``state_dict`` and ``load_state_dict`` can be saved along."""

    def __init__(self) -> None:
        self.epoch = self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.steps = state["epoch"], state["steps"]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    parser.add_argument("--stop-after", type=int, default=0, help="steps; 0: run to the end")
    parser.add_argument("--background", action="store_true", help="go on while a checkpoint is written")
    options = parser.parse_args(argv)

    project = ProjectConfiguration(options.folder, automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(project_config=project)
    set_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training, _ = loaders()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.9)
    model, optimizer, training, scheduler = accelerator.prepare(model, optimizer, training, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if accelerator.load_state(resume="latest"):
        accelerator.print(f"going on after step {progress.steps}")

    losses = []
    for epoch in range(progress.epoch, options.epochs):
        progress.epoch = epoch
        for batch in training:  # after load_state: the rest of the epoch under way, in the same order
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            progress.steps += 1
            if progress.steps % options.save_every == 0:
                progress.epoch = epoch + accelerator.gradient_state.end_of_dataloader
                accelerator.async_save_state() if options.background else accelerator.save_state()
            if progress.steps == options.stop_after:
                accelerator.print(f"stopped after step {progress.steps}")
                accelerator.end_training()
                return losses
    accelerator.end_training()  # waits for a save in the background
    accelerator.print(f"{progress.steps} steps, last loss {losses[-1]:.6f}" if losses else "nothing left to do")
    return losses


if __name__ == "__main__":
    main()
