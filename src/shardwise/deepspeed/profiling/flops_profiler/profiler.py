"""Floating-point operations of a model's forward, module by module, by torch's own formulas.

Matrix products, convolutions and attention count, a multiply-add as two; nothing else does. (DeepSpeed also estimates
elementwise operations, which are a few percent.) The model runs as it is, sharded or not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import torch
from torch import nn

from shardwise.deepspeed.accelerator.real_accelerator import get_accelerator
from shardwise.deepspeed.profiling.flops_profiler.words import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    params_to_string,
)
from shardwise.errors import ArgumentError
from shardwise.observe.flops import FlopCount


class _Spent:
    """What forwards of one module took, those of modules inside it included."""

    def __init__(self) -> None:
        self.flops, self.seconds, self.calls = 0, 0.0, 0


class FlopsProfiler:
    """Counts between :meth:`start_profile` and :meth:`stop_profile`.

    Args:
        model: its forwards count.
        ds_engine: no effect.
        recompute_fwd_factor: no effect: what is computed again in backward is no forward.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model, self.ds_engine, self.recompute_fwd_factor = model, ds_engine, recompute_fwd_factor
        self.started = False
        self._count: FlopCount | None = None
        self._hooks: list[Any] = []
        self._open: list[tuple[int, float]] = []
        self._spent: dict[nn.Module, _Spent] = {}

    def start_profile(self, ignore_list: Sequence[type[nn.Module]] | None = None) -> None:
        """Begin to count.

        Args:
            ignore_list: classes of modules that get no line of their own.
        """
        if self.started:
            self.stop_profile()
        self._spent, self._open = {}, []
        for module in self.model.modules():
            if module is self.model or not isinstance(module, tuple(ignore_list or ())):
                self._spent[module] = _Spent()
                self._hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._count = FlopCount()
        self._count.__enter__()
        self.started = True

    def stop_profile(self) -> None:
        """Count no more. What was counted stays."""
        if self.started and self._count is not None:
            self._count.__exit__(None, None, None)
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self.started = False

    def reset_profile(self) -> None:
        """Begin at zero."""
        self._spent = {module: _Spent() for module in self._spent}

    def end_profile(self) -> None:
        """Stop, and forget."""
        self.stop_profile()
        self._spent = {}

    def _enter(self, module: nn.Module, args: Any) -> None:
        assert self._count is not None
        get_accelerator().synchronize()
        self._open.append((self._count.total, perf_counter()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._count is not None
        get_accelerator().synchronize()
        flops, since = self._open.pop()
        spent = self._spent[module]
        spent.flops += self._count.total - flops
        spent.seconds += perf_counter() - since
        spent.calls += 1

    # --- the answers -----------------------------------------------------------------------------
    def _root(self) -> _Spent:
        return self._spent.get(self.model, _Spent())

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Of all forwards of the model."""
        return flops_to_string(self._root().flops) if as_string else self._root().flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-adds: half of the operations."""
        macs = self._root().flops // 2
        return macs_to_string(macs) if as_string else macs

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds in the model's forwards."""
        return duration_to_string(self._root().seconds) if as_string else self._root().seconds

    def get_total_params(self, as_string: bool = False) -> Any:
        """Parameters of the model, also where they are split."""
        total = sum(p.numel() for p in self.model.parameters())
        return params_to_string(total) if as_string else total

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Write a line for the model, and with ``detailed`` one for each module that was called.

        Args:
            profile_step: is in the heading.
            module_depth: how deep; -1: all.
            top_modules: no effect: all are shown.
            output_file: a path; ``None`` prints.
        """
        if output_file is not None:
            Path(output_file).parent.mkdir(parents=True, exist_ok=True)
        with open(output_file, "w") if output_file is not None else nullcontext(sys.stdout) as out:
            self._write(out, profile_step, module_depth if detailed else 0)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """:meth:`print_model_profile`, on the console."""
        self.print_model_profile(module_depth=module_depth)

    def _write(self, out: IO[str], step: int, depth: int) -> None:
        root = self._root()
        out.write(f"Floating-point operations of forwards, step {step}: {flops_to_string(root.flops)}\n")
        for name, module in self.model.named_modules():
            spent, level = self._spent.get(module), name.count(".") + bool(name)
            if spent is None or not spent.calls or (0 <= depth < level):
                continue
            share = spent.flops / root.flops if root.flops else 0.0
            params = params_to_string(sum(p.numel() for p in module.parameters()))
            label = f"{'  ' * level}{name.rpartition('.')[2] or type(module).__name__}"
            line = f"{label}: {params} params, {macs_to_string(spent.flops // 2)}, {share:.1%}, "
            out.write(f"{line}{duration_to_string(spent.seconds)}, {spent.calls} calls\n")


@torch.no_grad()
def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Operations, multiply-adds and parameters of one forward of a model, in evaluation mode.

    Args:
        input_shape: of the one tensor that it is called with; or
        args, kwargs: what it is called with.
        print_profile, detailed, module_depth, top_modules, output_file: see :meth:`FlopsProfiler.print_model_profile`.
        warm_up: calls before that.
        as_string: give words.
        ignore_modules: classes without a line of their own.
        mode: ``forward``, or ``generate``: call that method.

    Raises:
        ArgumentError: nothing to call it with, or another mode.
    """
    if input_shape is not None:
        p = next(model.parameters(), torch.empty(0))
        args = [torch.ones(input_shape, dtype=p.dtype, device=p.device)]
    if not args and not kwargs:
        raise ArgumentError("get_model_profile got no inputs", fix="give input_shape, args or kwargs")
    if mode not in ("forward", "generate"):
        raise ArgumentError(f"mode={mode!r}", fix="'forward' or 'generate'")
    call = model if mode == "forward" else model.generate
    training = model.training
    model.eval()
    profiler = FlopsProfiler(model)
    try:
        for _ in range(warm_up):
            call(*args, **(kwargs or {}))  # type: ignore[operator]
        profiler.start_profile(ignore_modules)
        call(*args, **(kwargs or {}))  # type: ignore[operator]
        profiler.stop_profile()
        if print_profile:
            profiler.print_model_profile(
                profile_step=warm_up, module_depth=module_depth, top_modules=top_modules, detailed=detailed,
                output_file=output_file,
            )  # fmt: skip
        found = [getattr(profiler, f"get_total_{what}")(as_string) for what in ("flops", "macs", "params")]
    finally:
        profiler.end_profile()
        model.train(training)
    return found[0], found[1], found[2]
