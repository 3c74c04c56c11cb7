"""A diffusion model of diffusers': the loop of its own scripts, under any strategy, with samples drawn by all ranks.

pip install diffusers
shardwise launch --nproc 2 --strategy zero3 examples/diffusers_unet.py --save /tmp/pipeline
"""

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

import shardwise
from shardwise import Accelerator
from shardwise.utils import set_seed


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", default="", help="a folder for the pipeline")
    options = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=50)
    stripes = torch.ones(1, 8, 8) * (torch.arange(8) % 2 * 2.0 - 1)
    loader = DataLoader([stripes] * 16 * options.steps, batch_size=8, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=3)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    losses = []
    for clean in loader:
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 50, (len(clean),), device=clean.device)
        with accelerator.accumulate(model):
            predicted = model(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(predicted, noise)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    pipeline = DDPMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, num_inference_steps=5, output_type="np")  # every rank draws its own: values come as needed
    if options.save:
        with shardwise.gathered(model):  # whole while the main process writes
            if accelerator.is_main_process:
                pipeline.save_pretrained(options.save)
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
