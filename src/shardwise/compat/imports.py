"""What is there: devices, precisions, packages. Asking imports no package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from shardwise import device
from shardwise.compat.versions import compare_versions, is_torch_version


def _installed(package: str, *distributions: str) -> bool:
    """Is it importable, and did a distribution bring it? A folder of that name beside the script is not enough."""
    if importlib.util.find_spec(package) is None:
        return False
    for name in distributions or (package,):
        try:
            importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _package(package: str, *distributions: str) -> Callable[[], bool]:
    def available() -> bool:
        return _installed(package, *distributions)

    available.__doc__ = f"Is the package ``{package}`` installed?"
    return available


is_amdsmi_available = _package("amdsmi")
is_boto3_available = _package("boto3")
is_clearml_available = _package("clearml")
is_comet_ml_available = _package("comet_ml", "comet_ml", "comet-ml")
is_datasets_available = _package("datasets")
is_deepspeed_available = _package("deepspeed")
is_dvclive_available = _package("dvclive")
is_import_timer_available = _package("import_timer")
is_lomo_available = _package("lomo_optim", "lomo-optim")
is_matplotlib_available = _package("matplotlib")
is_mlflow_available = _package("mlflow", "mlflow", "mlflow-skinny")
is_pandas_available = _package("pandas")
is_peft_available = _package("peft")
is_pynvml_available = _package("pynvml", "pynvml", "nvidia-ml-py")
is_pytest_available = _package("pytest")
is_rich_available = _package("rich")
is_sagemaker_available = _package("sagemaker")
is_schedulefree_available = _package("schedulefree")
is_swanlab_available = _package("swanlab")
is_timm_available = _package("timm")
is_torchdata_available = _package("torchdata")
is_torchvision_available = _package("torchvision")
is_tqdm_available = _package("tqdm")
is_trackio_available = _package("trackio")
is_transformers_available = _package("transformers")
is_triton_available = _package("triton", "triton", "triton-xpu")
is_wandb_available = _package("wandb")


def is_tensorboard_available() -> bool:
    """Is the package ``tensorboard`` installed, or ``tensorboardX``?"""
    return _installed("tensorboard") or _installed("tensorboardX")


def is_aim_available() -> bool:
    """Is the package ``aim`` installed, before version 4?"""
    return _installed("aim") and compare_versions("aim", "<", "4.0.0")


def is_bnb_available(min_version: str | None = None) -> bool:
    """Is the package ``bitsandbytes`` installed, in this version at least?"""
    return _installed("bitsandbytes") and (min_version is None or compare_versions("bitsandbytes", ">=", min_version))


def is_weights_only_available() -> bool:
    """Can ``torch.load`` read weights alone? Always with the versions of torch that are supported."""
    return True


def is_torchdata_stateful_dataloader_available() -> bool:
    """Is ``torchdata`` installed, with its ``StatefulDataLoader``?"""
    return _installed("torchdata") and compare_versions("torchdata", ">=", "0.8.0")


# --- devices ---------------------------------------------------------------------------------
def is_cuda_available() -> bool:
    """Is there a CUDA device? Asks the driver without starting CUDA in this process."""
    return device.available("cuda")


def is_rocm_available() -> bool:
    """Is there a device of AMD's?"""
    return torch.version.hip is not None and is_cuda_available()


def is_mps_available(min_version: str = "1.12") -> bool:
    """Is there a device of Apple's, and torch in this version at least?"""
    return is_torch_version(">=", min_version) and torch.backends.mps.is_available()


def is_xpu_available(check_device: bool = False) -> bool:
    """Is there a device of Intel's?"""
    return device.available("xpu")


def _device(name: str, plugin: str) -> Callable[..., bool]:
    def available(check_device: bool = False) -> bool:
        # The plugin registers its device with torch when it is imported, which is the script's to do.
        return importlib.util.find_spec(plugin) is not None and device.available(name)

    available.__doc__ = f"Is there a device of type ``{name}``, and ``{plugin}`` imported?"
    return available


is_hpu_available = _device("hpu", "habana_frameworks")
is_mlu_available = _device("mlu", "torch_mlu")
is_musa_available = _device("musa", "torch_musa")
is_neuron_available = _device("neuron", "torch_neuronx")
is_npu_available = _device("npu", "torch_npu")
is_sdaa_available = _device("sdaa", "torch_sdaa")


# --- what this library leaves out ---------------------------------------------------------------
def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Can models train through XLA? Never here."""
    return False


def is_fp8_available() -> bool:
    """Can models compute in fp8? Never here."""
    return False


def is_megatron_lm_available() -> bool:
    """Can models train through Megatron-LM? Never here."""
    return False


def is_pippy_available() -> bool:
    """Can models be cut into a pipeline? Never here."""
    return False


# --- precisions ------------------------------------------------------------------------------
def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Can the device compute in bf16? CPUs can."""
    return device.computes_in_bf16()


def is_fp16_available() -> bool:
    """Can the device compute in fp16? They all can."""
    return True
