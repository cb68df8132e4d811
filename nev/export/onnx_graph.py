"""A tower as an ONNX graph, and the graph in fewer bits: float16, and int8 by dynamic quantisation."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from torch import Tensor, nn

from nev.config.model_spec import ModelError
from nev.export.rotary import simplify_rotary
from nev.inference.model import Model
from nev.models.image_encoder import ImageEncoder
from nev.models.text_encoder import pool_tokens
from nev.ops.onednn import Linear1x1

OPSET = 20
ONE_FILE = 1_900_000_000  # bytes of weights that a protobuf file can hold; the weights of a larger tower lie beside it
OUTPUT = "embedding"  # float32 [b, D], of unit length
AXES = {
    "pixel_values": {0: "batch"},
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
}
# MatMul and Gemm are products with weights, and Gather reads the table of a text encoder's tokens. Convolutions stay: ONNX
# Runtime has no fast ConvInteger.
QUANTISED = ["MatMul", "Gemm", "Gather"]


class TextGraph(nn.Module):
    """Token ids to unit vectors, as `TextTower.encode` computes them.

    model: of transformers. pooling, layer_norm: as in `TextTower`.
    """

    def __init__(self, model: nn.Module, pooling: str, layer_norm: bool) -> None:
        super().__init__()
        self.model, self.pooling, self.layer_norm = model, pooling, layer_norm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Two of int64 [b, T] -> float32 [b, D] of unit length."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool_tokens(hidden, attention_mask, self.pooling, self.layer_norm)


def copy_vision(model: Model) -> ImageEncoder:
    """The vision tower in float32 on the CPU, with plain layers: a copy, for the caller's model must not change."""
    tower: ImageEncoder = _plain_copy(model.vision)
    tower.bf16 = False  # no runtime of ONNX on a CPU has bfloat16
    simplify_rotary(tower.trunk)
    return tower


def _plain_copy(module: Any) -> Any:
    """A copy on the CPU. `Linear1x1` chooses its operator by the batch, and a graph would keep the example's choice."""
    plain = copy.deepcopy(module).cpu()
    for part in plain.modules():
        if type(part) is Linear1x1:
            part.__class__ = nn.Linear  # type: ignore[assignment]
    return plain


def write_vision_graph(tower: ImageEncoder, image_size: int, file: Path) -> None:
    """Write the vision tower: pixel_values, float32 [b, 3, S, S] -> embedding. image_size: S, in pixels."""
    _write_graph("vision", tower, {"pixel_values": torch.randn(2, 3, image_size, image_size)}, file)


def write_text_graph(model: Model, file: Path) -> None:
    """Write the text tower: input_ids and attention_mask, int64 [b, T] -> embedding."""
    tower = model.text
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    example = {"input_ids": torch.full_like(mask, int(tower.tokenizer.pad_token_id)), "attention_mask": mask}
    _write_graph("text", TextGraph(_plain_copy(tower.model), tower.pooling, tower.layer_norm), example, file)


def _write_graph(what: str, module: nn.Module, example: dict[str, Tensor], file: Path) -> None:
    """Write a module in eval mode. example: inputs by name. Raises ModelError for an architecture that torch cannot trace."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch, about its own names of axes
            program: Any = torch.onnx.export(
                module.eval(),
                tuple(example.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=[OUTPUT],
                dynamic_shapes=tuple(AXES[name] for name in example),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ModelError(
            f"the {what} tower cannot be written as an ONNX graph ({cause}): export it with --format hf"
        ) from error
    NameFixPass()(program.model)  # a layer of the tower may be called `embedding`, too
    program.model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # torch has folded the constants
    size = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    program.save(file, external_data=size > ONE_FILE)


def _weights_beside(file: Path) -> bool:
    return file.with_name(f"{file.name}.data").exists()


def write_float16(source: Path, file: Path) -> None:
    """Convert a graph to float16, weights and arithmetic. Its inputs, its output and the last step, L2, stay float32."""
    nodes = onnx.load(source, load_external_data=False).graph.node
    last = max(number for number, node in enumerate(nodes) if node.op_type == "ReduceL2")
    converted = convert_float_to_float16(
        str(source),
        keep_io_types=True,
        op_block_list=DEFAULT_OP_BLOCK_LIST,
        node_block_list=[node.name for node in nodes[last:]],
    )
    graph = onnx_ir.from_proto(converted)
    _drop_roundings(graph.graph)
    RemoveUnusedNodesPass()(graph)
    for value in graph.graph.initializers.values():
        value.dtype = value.const_value.dtype  # the conversion says float16 of some that it leaves in float32
    graph.graph.sort()  # the conversion leaves it in an order that the standard forbids
    onnx_ir.save(graph, file, external_data=f"{file.name}.data" if _weights_beside(source) else None)


def _drop_roundings(graph: onnx_ir.Graph) -> None:
    """Between two nodes that stay float32, the conversion rounds to float16 and back: leave that out."""
    for node in graph:
        rounding = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] else None
        if rounding is not None and (rounding.name or "").endswith("_cast_to_fp16_node"):
            node.replace_input_with(0, rounding.inputs[0])


def write_int8(source: Path, file: Path) -> None:
    """Quantise a graph: int8 weights with a scale a channel, and activations rounded to uint8 as they come (dynamic)."""
    quantize_dynamic(
        source,
        file,
        op_types_to_quantize=QUANTISED,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=_weights_beside(source),
    )
