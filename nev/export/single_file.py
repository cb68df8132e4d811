"""Files of an export for those who have no nev: `modeling_nev.py` and `reader.py`.

They are put together from the source that this process runs, so they and nev cannot differ.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from types import ModuleType

from nev.data import colour
from nev.export import hf_model
from nev.export.templates import reader
from nev.models import create_trunk, frozen, heads, image_encoder, nomic, pools, trunk, trunk_trace

HEADER = '''"""A vision tower that nev trained, as a model of transformers. Needs torch, timm and transformers.

Put together from the source of nev {version} (Apache-2.0). With nev installed, `import nev` replaces this file.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.mlp import SwiGLU
from timm.layers.weight_init import trunc_normal_tf_
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

Vision = Any  # the section `vision` of config.json


class ConfigError(ValueError):
    """A config that cannot be built."""
'''

COLOUR_IMPORT = "from nev.data.colour import NoColour, to_rgb\n"  # in the template of reader.py
PARTS: Sequence[tuple[ModuleType, Sequence[str]]] = (
    (nomic, ("MLP_NORM_EPS", "match_released")),
    (
        create_trunk,
        (
            "RESERVED_ARGUMENTS",
            "BUILD_ERRORS",
            "create_trunk",
            "_list_choices",
            "_describe",
            "_suggest",
            "_list_arguments",
        ),
    ),
    (trunk_trace, ("Trace", "encode_images", "trace_trunk", "_without_numbers", "list_leaves", "_refuse_size")),
    (trunk, ("build_trunk", "_remove_idle_parts")),
    (
        pools,
        (
            "INIT_STD",
            "NomicPool",
            "ClsPool",
            "MeanPool",
            "ClsMeanPool",
            "has_class_token",
            "count_prefix",
            "_count_class_tokens",
            "build_pool",
            "_trunk_heads",
        ),
    ),
    (heads, ("build_head", "make_linear", "MlpHead", "SwiGLUHead")),
    (frozen, ("LEAST_DEVIATION",)),
    (image_encoder, ("ImageEncoder", "assemble_image_encoder")),
    (hf_model, ("NevVisionConfig", "NevVisionModel")),
)


def make_modeling_file(version: str) -> str:
    """The text of `modeling_nev.py`. version: of nev."""
    parts = [part for module, names in PARTS for part in _read_parts(module, names)]
    return "\n\n".join([HEADER.replace("{version}", version), *parts]) + "\n"


def make_reader_file() -> str:
    """The text of `reader.py`. Where the template imports colours from nev, their source stands."""
    source, definitions = inspect.getsource(colour), (ast.Assign, ast.ClassDef, ast.FunctionDef)
    parts = [
        ast.get_source_segment(source, node) or "" for node in ast.parse(source).body if isinstance(node, definitions)
    ]
    template = inspect.getsource(reader)
    assert template.count(COLOUR_IMPORT) == 1
    return template.replace(COLOUR_IMPORT, "\n\n\n".join(parts) + "\n")


def _read_parts(module: ModuleType, names: Sequence[str]) -> list[str]:
    """The source of names at the top of a module, in the order of `names`."""
    source = inspect.getsource(module)
    sources = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for target in targets:
            name = target.id if isinstance(target, ast.Name) else getattr(target, "name", "")
            if name in names:
                decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
                lines = [f"@{decorator}\n" for decorator in decorators]
                sources[name] = "".join(lines) + (ast.get_source_segment(source, node) or "")
    return [sources[name] + "\n" if name[0].islower() or name[0] == "_" else sources[name] for name in names]
