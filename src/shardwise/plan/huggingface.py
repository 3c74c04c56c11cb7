"""Models of transformers, from a configuration: which class, which inputs, which loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.errors import MissingPackage, PlanError, did_you_mean
from shardwise.plan.building import SmallValues

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Without `architectures` the head follows from the kind of model: the first of these that transformers has for it.
_HEADS = ("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "SpeechSeq2Seq", "CTC")
_LEARNED_POSITIONS = ("gpt2", "bert", "roberta", "opt", "electra", "distilbert", "bart", "albert")
_FROM_START = 512  # tokens; what an encoder reads where its configuration says no more


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage(
            "a configuration of Hugging Face needs transformers to become a model",
            fix="pip install transformers, or give module:function",
        ) from error
    return transformers


def read(path: Path) -> dict[str, Any]:
    """The values of a ``config.json``.

    Args:
        path: the file, or a folder with it.

    Raises:
        PlanError: it is not there, or not such a file.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise PlanError("there is no config.json", where=str(path), fix="give the folder of a model") from None
    except (OSError, ValueError) as error:
        raise PlanError(f"this is not a configuration of Hugging Face: {error}", where=str(file)) from None
    if not isinstance(values, dict):
        raise PlanError("this is not a configuration of Hugging Face: it holds no keys", where=str(file))
    return values


class Recipe:
    """How to make and train one model of transformers.

    Args:
        values: of its ``config.json``.
        where: they are from, for errors.

    Raises:
        PlanError: they name no model that this version of transformers has.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        hub = _transformers()
        self.where = where
        self.notes: list[str] = []
        values = dict(values)
        kind = values.pop("model_type", None)
        names = values.get("architectures") or []
        if kind is None:
            kind = self._kind_of(hub, names)
        try:
            self.config = hub.AutoConfig.for_model(kind, **values)
        except (ValueError, KeyError) as error:
            known = list(hub.models.auto.configuration_auto.CONFIG_MAPPING.keys())
            if kind not in known:
                fix = did_you_mean(str(kind), known, "models with code of their own: give module:function")
                what = f"transformers {hub.__version__} has no model_type '{kind}'"
            else:
                what, fix = f"transformers refuses this configuration: {_line(error)}", "correct it"
            raise PlanError(what, where=where, fix=fix) from None
        except Exception as error:  # noqa: BLE001  (its checks raise classes of several libraries)
            raise PlanError(f"transformers refuses this configuration: {_line(error)}", where=where) from None
        self.cls = self._class_of(hub, names)
        for config in _all_configs(self.config):
            if getattr(config, "use_cache", False):
                config.use_cache = False
        self.text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        self.routed = any(_experts(config) > 1 for config in _all_configs(self.config))
        self.main = getattr(self.cls, "main_input_name", "input_ids")
        if self.routed:
            self.notes.append(
                "experts are computed as grouped matrix products (transformers' default), whose memory does not depend "
                "on how tokens are routed; times are those of even routing"
            )
        if self.main == "input_ids" and hasattr(self.config, "vision_config"):
            self.notes.append("steps are of text alone: images would come on top")

    def _kind_of(self, hub: Any, names: list[str]) -> str:
        found = getattr(hub, names[0], None) if names else None
        kind = getattr(getattr(found, "config_class", None), "model_type", None)
        if not kind:
            raise PlanError(
                "the configuration names no model: it has neither model_type nor architectures that transformers knows",
                where=self.where,
                fix='add "model_type" (such as "llama") and "architectures", as save_pretrained() writes them',
            )
        return str(kind)

    def _class_of(self, hub: Any, names: list[str]) -> Any:
        if names:
            found = getattr(hub, str(names[0]), None)
            if found is None:
                raise PlanError(
                    f"transformers {hub.__version__} has no class '{names[0]}'",
                    where=self.where,
                    fix=did_you_mean(str(names[0]), dir(hub), "models with code of their own: give module:function"),
                )
            return found
        for head in _HEADS:
            auto = getattr(hub, f"AutoModelFor{head}", None)
            if auto is not None and type(self.config) in auto._model_mapping:
                found = auto._model_mapping[type(self.config)]
                found = found[0] if isinstance(found, (tuple, list)) else found
                self.notes.append(f"the configuration names no architecture: {found.__name__} is assumed")
                return found
        raise PlanError(
            f"the configuration names no architecture, and '{self.config.model_type}' has no usual one",
            where=self.where,
            fix='add "architectures": ["…"], as save_pretrained() writes it',
        )

    def model(self) -> nn.Module:
        """The model on the meta device, in fp32, for training.

        Raises:
            PlanError: transformers cannot build it.
        """
        config = copy.deepcopy(self.config)
        try:
            with torch.device("meta"), SmallValues():
                made = self.cls._from_config(config, dtype=torch.float32)
        except Exception as error:
            raise PlanError(f"{self.cls.__name__} cannot be built: {_line(error)}", where=self.where) from error
        return made.train()

    @property
    def reads_text(self) -> bool:
        """Whether rows have a length, as those of pictures do not unless text stands beside them."""
        return self.main != "pixel_values" or hasattr(self.config, "text_config")

    def limit(self) -> int | None:
        """Tokens of the longest row, if its positions have parameters of their own; ``None`` if there is no end."""
        return self._positions() if self.config.model_type in _LEARNED_POSITIONS else None

    def _positions(self) -> int | None:
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
            value = getattr(self.text, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return None

    def length(self) -> int | None:
        """Tokens of one row if nobody says: 2,048, or what the model reads; ``None`` if rows are pictures."""
        if self.main == "pixel_values":
            return None
        if self.main == "input_features":
            return int(getattr(self.config, "max_target_positions", None) or 448)
        if self.main == "input_values":
            return 160_000  # samples: ten seconds
        positions = self._positions() or _FROM_START
        return min(positions, 2048)

    def inputs(self, batch: int, seq: int | None, device: torch.device | str) -> dict[str, torch.Tensor]:
        """What a training step of it is given: without an attention mask, as rows without padding need none.

        Raises:
            PlanError: it is no model of text, pictures or sound.
        """

        def ids(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=device)

        name = self.cls.__name__
        length = seq or 0
        rows: dict[str, torch.Tensor]
        if self.main == "pixel_values":
            rows = {"pixel_values": self._pictures(batch, device)}
            if "contrastive" in name.lower() or name in ("CLIPModel", "SiglipModel"):
                rows["input_ids"] = ids(batch, length or 77)
        elif self.main == "input_features":
            frames = 2 * int(getattr(self.config, "max_source_positions", 1500))
            rows = {"input_features": torch.zeros(batch, self.config.num_mel_bins, frames, device=device)}
        elif self.main == "input_values":
            rows = {"input_values": torch.zeros(batch, length, device=device)}
        elif self.main == "input_ids":
            rows = {"input_ids": ids(batch, length)}
        else:
            raise PlanError(
                f"{name} is fed with '{self.main}', which the planner cannot make up",
                where=self.where,
                fix="give module:function, a function that returns the model and an example of its inputs",
            )
        if name.endswith("ForImageClassification") or name.endswith("ForSequenceClassification"):
            rows["labels"] = ids(batch)
        elif name.endswith("ForQuestionAnswering"):
            rows |= {"start_positions": ids(batch), "end_positions": ids(batch)}
        elif name.endswith("ForSemanticSegmentation"):
            rows["labels"] = ids(batch, *rows["pixel_values"].shape[-2:])
        elif name.endswith("ForCTC"):
            rows["labels"] = ids(batch, 100)
        elif self.main in ("input_ids", "input_features") and name.endswith(
            ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification",
             "ForPreTraining", "WithLMHead")
        ):  # fmt: skip
            rows["labels"] = ids(batch, length)
            if name == "BertForPreTraining":
                rows["next_sentence_label"] = ids(batch)
        return rows

    def _pictures(self, batch: int, device: torch.device | str) -> torch.Tensor:
        config = self.config if hasattr(self.config, "image_size") else getattr(self.config, "vision_config", None)
        size = getattr(config, "image_size", None) or 224
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config or self.config, "num_channels", 3)
        return torch.zeros(batch, channels, high, wide, device=device)


def _all_configs(config: Any) -> list[Any]:
    inner = [v for v in vars(config).values() if hasattr(v, "model_type") and hasattr(v, "to_dict")]
    return [config, *(c for value in inner for c in _all_configs(value))]


def _experts(config: Any) -> int:
    found = [v for name in _EXPERTS if isinstance(v := getattr(config, name, None), int)]
    return max(found, default=0)


def _line(error: BaseException) -> str:
    """An error of another library as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
