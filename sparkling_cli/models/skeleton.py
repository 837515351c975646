"""Models of a config, on the meta device or as tiny real instances; nothing else builds models.

Only classes of the installed ``transformers`` and a factory that the user named are ever built:
no code is imported from a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import CheckpointError, LayoutError, MissingDependencyError, SparklingError

ConfigDict = dict[str, Any]
ModelFactory = Callable[[ConfigDict], nn.Module]

# Keys that name a checkpoint's numerics or remote code; a skeleton is independent of both.
_DROPPED = ("quantization_config", "auto_map", "torch_dtype", "dtype", "_name_or_path")


@functools.lru_cache(maxsize=1)
def causal_lm_names() -> dict[str, str]:
    """Return ``model_type -> class name`` for every causal LM of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {kind: name if isinstance(name, str) else name[0] for kind, name in listed}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of building many throw-away models."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)


def clean_config(config: Mapping[str, Any]) -> ConfigDict:
    """Return a deep copy of ``config`` without keys that must not influence a skeleton."""
    copied: ConfigDict = _numbers(dict(config))
    for table in [copied, *(value for value in copied.values() if isinstance(value, dict))]:
        for key in _DROPPED:
            table.pop(key, None)
    return copied


def _numbers(value: Any) -> Any:
    """A deep copy; config.json writes infinity as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return copy.deepcopy(value)


def default_config(model_type: str) -> ConfigDict:
    """Return the default config of a model type as a plain dict."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with quiet():
        config: ConfigDict = CONFIG_MAPPING[model_type]().to_dict()
    return clean_config(config)


def config_object(config: Mapping[str, Any]) -> Any:
    """Build the transformers config object of a config dict (never with remote code)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:  # a copy of a known class under a name of its own (Kimi-K2)
        model_type = next(
            (t for name in config.get("architectures") or () if (t := _type_of(name))), model_type
        )
    if model_type is None:
        raise LayoutError(
            "there is no model_type, so this is no config of a transformers class",
            hint="give the config.json of a checkpoint, a layout file (--layout), or your own model "
            "(--model package.module:factory)",
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise LayoutError(
            f"config.json names model_type {model_type!r}, which the installed transformers does not have",
            hint="upgrade transformers, give a layout file (--layout), or your own model "
            "(--model package.module:factory)",
        )
    with quiet(), model_errors(config):
        built = CONFIG_MAPPING[model_type].from_dict({**clean_config(config), "model_type": model_type})
    # A sub-config may hold attributes that only from_dict of the parent fixes up.
    built._attn_implementation = "eager"
    with contextlib.suppress(Exception):
        built._experts_implementation = "eager"
    return built


def _type_of(class_name: object) -> str | None:
    """The model type of a class of the library; None of other names."""
    import transformers

    config_class = getattr(getattr(transformers, str(class_name), None), "config_class", None)
    return getattr(config_class, "model_type", None)


#: the first version of transformers whose models can be built without their weights as is done here
NEEDED = (5, 0)


def _check_version() -> None:
    """The installed transformers, if there is one, is new enough.

    Raises:
        MissingDependencyError: it is too old; says which is needed and which is there.
    """
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return  # the import says so
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < NEEDED:
        needed = ".".join(map(str, NEEDED))
        raise MissingDependencyError(
            f"transformers {needed} or later is needed to build a model from its own code; "
            f"{found} is installed",
            hint=f"pip install 'transformers>={needed}', in an environment of its own if the trainer needs "
            f"{found}; or give a layout file (--layout)",
        )


@contextlib.contextmanager
def model_errors(config: Mapping[str, Any], model: str | None = None) -> Iterator[None]:
    """What a model's own code raises on a config becomes an error of ours; it can raise anything.

    Raises:
        LayoutError: names the config's class and what the code raised.
        MissingDependencyError: the code needs a package that is not installed, or is too old.
    """
    if model is None:
        _check_version()
    try:
        yield
    except SparklingError:
        raise
    except ImportError as error:
        if error.name in ("transformers", "accelerate"):
            raise MissingDependencyError(
                f"the model's own code is needed, to find its layout and the order in which an optimizer "
                f"numbers its parameters, and {error.name} is not installed",
                hint="pip install '.[hf]' in the clone; for weights alone a layout file (--layout) is enough",
            ) from error
        raise MissingDependencyError(
            f"this model's code needs a package that cannot be imported: {error}",
            hint="install it, or give a layout file (--layout)",
        ) from error
    except Exception as error:
        raised = " ".join(f"{type(error).__name__}: {error}".split())
        whose = model or f"the class of model_type {config.get('model_type')!r}"
        raise LayoutError(
            f"{whose} cannot be built from this config: {raised:.400}",
            hint="correct the config, or give a layout file (--layout)",
        ) from error


def text_config(config: Mapping[str, Any], *, factory: ModelFactory | None = None) -> ConfigDict:
    """Return the whole config, defaults filled in, that the language model itself is built from."""
    return text_part(config, factory=factory)[0]


def text_part(
    config: Mapping[str, Any], *, factory: ModelFactory | None = None
) -> tuple[ConfigDict, tuple[str, ...]]:
    """The same, and its path inside ``config``; () where it is the whole."""
    if factory is not None:
        return clean_config(config), ()
    built = config_object(config)
    cls = model_class(config, built)
    prefix: tuple[str, ...] = ()
    wanted = getattr(cls, "config_class", None)
    for key, sub in getattr(built, "sub_configs", {}).items():
        if wanted is not None and sub is wanted and not isinstance(built, wanted):
            built, prefix = getattr(built, key), (key,)
            break
    found = clean_config(built.to_dict())
    found["architectures"] = [cls.__name__]
    return found, prefix


def model_class(config: Mapping[str, Any], built: Any) -> Any:
    """Return the class that ``architectures`` names, or the causal LM of the config's type.

    Raises:
        CheckpointError: the class is built from configs of another type.
        LayoutError: there is none.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = set(causal_lm_names().values())
    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None)
        if found is not None and (name in known or hasattr(found, "generate")):
            _check_type(built, found)
            return found
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(built)]
    except KeyError:
        raise LayoutError(
            f"transformers has no causal LM for model_type {config.get('model_type')!r}",
            hint="give a layout file (--layout) or your own model (--model module:factory)",
        ) from None


def _check_type(built: Any, cls: Any) -> None:
    """The class that ``architectures`` names takes configs of this ``model_type``, or of a part of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = getattr(cls, "config_class", None)
    model_type = built.model_type
    listed = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type), ())
    if wanted is None or cls.__name__ in ((listed,) if isinstance(listed, str) else listed):
        return
    if not _has_part(type(built), wanted):
        raise CheckpointError(
            f"config.json says model_type {model_type!r} and architectures {cls.__name__!r}, which is of "
            f"model_type {wanted.model_type!r}",
            hint="the config was damaged or mixed from two models: restore it from a copy",
        )


def _has_part(config_class: Any, wanted: Any) -> bool:
    """The config class is of that kind, or holds one; a part of any kind (``AutoConfig``) may be it."""
    if issubclass(config_class, wanted) or not hasattr(config_class, "model_type"):
        return True
    parts = getattr(config_class, "sub_configs", {}).values()
    return any(_has_part(part, wanted) for part in parts if part is not config_class)


#: what stands before the class's own words where its config refuses a size
_WRAPPED = re.compile(r"^LayoutError: the class of .*?Class validation error for validator '\w+': ")


def words_of(error: Exception) -> str:
    """What a class raised, in one line and in its own words."""
    text = error.message if isinstance(error, SparklingError) else str(error)
    return _WRAPPED.sub("", " ".join(f"{type(error).__name__}: {text}".split()))


def build_model(
    config: Mapping[str, Any], *, meta: bool = True, factory: ModelFactory | None = None
) -> nn.Module:
    """Build the model of ``config``, in eval mode: shapes only (``meta``) or real tensors.

    Raises whatever the model's own code raises on sizes that it does not accept.
    """
    context: contextlib.AbstractContextManager[Any] = (
        torch.device("meta") if meta else contextlib.nullcontext()
    )
    with quiet():
        if factory is not None:
            with context:
                return factory(copy.deepcopy(dict(config))).eval()
        built = config_object(config)
        cls = model_class(config, built)
        with context, _no_init(meta):
            model: nn.Module = cls(built)
        if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
            tie: Any = model.tie_weights
            tie()  # initialization does it elsewhere, and it is skipped on meta
    return model.eval()


def shared_names(model: nn.Module) -> list[list[str]]:
    """Names of the state dict that are one tensor, group by group."""
    owners: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(name)
    return [names for names in owners.values() if len(names) > 1]


def _no_init(meta: bool) -> contextlib.AbstractContextManager[Any]:
    """Skip weight initialization where there are no weights."""
    if not meta:
        return contextlib.nullcontext()
    for module_name in ("transformers.initialization", "transformers.modeling_utils"):
        skip = getattr(importlib.import_module(module_name), "no_init_weights", None)
        if skip is not None:
            context: contextlib.AbstractContextManager[Any] = skip()
            return context
    return contextlib.nullcontext()


def load_factory(reference: str) -> ModelFactory:
    """Import ``package.module:factory``, which the user named explicitly."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise LayoutError(
            f"--model {reference!r} is not of the form package.module:factory",
            hint="name a callable that takes the config dict and returns an nn.Module",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LayoutError(
            f"--model {reference!r} cannot be imported: {error}",
            hint="the module must be importable from here (PYTHONPATH)",
        ) from error
    try:
        found = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise LayoutError(
            f"--model {reference!r}: {error}",
            hint=f"did you mean {module_name}:{near[0]}?" if near else f"{module.__file__} was imported",
        ) from error
    if not callable(found):
        raise LayoutError(f"--model {reference!r} is not callable")
    factory: ModelFactory = found
    return factory
