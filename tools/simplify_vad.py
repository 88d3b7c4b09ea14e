"""Reduce Silero VAD's ONNX file to the network that 16 kHz audio takes through it.

    python tools/simplify_vad.py silero_vad.onnx speechrnt/assets/silero_vad/silero_vad_16k.onnx

The original (https://github.com/snakers4/silero-vad) holds two networks, for 8 and 16 kHz, amid
control flow for shapes that do not occur here. The weights are copied, the convolutions become
products of matrices, and the results are the same up to rounding, which the tests check. A frame
costs half as much alone, and a sixth among sixteen.

Inputs: ``input`` (frames, 576), of which each row is 64 samples of context and 512 of its own;
``h`` and ``c`` (1, 1, 128), the state. Outputs: ``probability`` (frames,), and the state after the
last frame.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BINS = 129
OPSET = 17


def read_weights(path):
    """Return the constants of the branch for 16 kHz by the ends of their names."""
    model = onnx.load(path)
    [switch] = [node for node in model.graph.node if node.op_type == "If"]
    [branch] = [each.g for each in switch.attribute if each.name == "then_branch"]
    constants = {}
    for node in branch.node:
        if node.op_type == "Constant":
            name = node.output[0].split("Inline_0__")[-1]
            constants[name] = numpy_helper.to_array(node.attribute[0].t)
    return constants


def build(weights):
    """Return the reduced model."""
    nodes, initializers = [], []

    def constant(name, array):
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def gates(name):
        # PyTorch's order is input, forget, cell, output; ONNX's is input, output, forget, cell.
        i, f, c, o = np.split(weights[name], 4)
        return np.concatenate([i, o, f, c])

    def slices(x, name, n_taps, stride, length):
        """Lay the taps of a convolution side by side: (frames, length, taps * channels)."""
        taps = []
        for tap in range(n_taps):
            limits = [constant(f"{name}.start{tap}", np.array([tap])),
                      constant(f"{name}.end{tap}", np.array([tap + stride * (length - 1) + 1])),
                      "axis1", constant(f"{name}.step{tap}", np.array([stride]))]  # fmt: skip
            taps.append(add("Slice", [x, *limits], f"{name}.tap{tap}"))
        return taps[0] if n_taps == 1 else add("Concat", taps, f"{name}.taps", axis=2)

    def convolve(x, index, stride, length):
        """Convolve over time, three taps, as one product of matrices."""
        weight = weights[f"encoder.{index}.reparam_conv.weight"]
        kernel = constant(f"w{index}", weight.transpose(2, 1, 0).reshape(-1, weight.shape[0]))
        bias = constant(f"b{index}", weights[f"encoder.{index}.reparam_conv.bias"])
        padded = add("Pad", [x, "around"], f"padded{index}")
        x = add(
            "MatMul", [slices(padded, f"conv{index}", 3, stride, length), kernel], f"sum{index}"
        )
        return add("Relu", [add("Add", [x, bias], f"biased{index}")], f"relu{index}")

    constant("axis1", np.array([1]))
    constant("around", np.array([0, 1, 0, 0, 1, 0]))  # a frame of zeros before and after
    signal = add("Pad", ["input", constant("pads", np.array([0, 0, 0, 64]))], "signal",
                 mode="reflect")  # fmt: skip
    # Windows of 256 samples, every 128: two neighbouring blocks of 128 each.
    blocks = add("Reshape", [signal, constant("blocks", np.array([-1, 5, 128]))], "hops")
    basis = constant("basis", weights["stft.forward_basis_buffer"][:, 0].T)
    spectrum = add("MatMul", [slices(blocks, "stft", 2, 1, 4), basis], "spectrum")
    split = constant("split", np.array([BINS, BINS]))
    nodes.append(helper.make_node("Split", [spectrum, split], ["real", "imaginary"], axis=2))
    power = add("Add", [add("Mul", ["real", "real"], "real2"),
                        add("Mul", ["imaginary", "imaginary"], "imaginary2")], "power")  # fmt: skip
    x = add("Sqrt", [power], "magnitude")
    # Four frames of the spectrum become two, one and one.
    for index, (stride, length) in enumerate(((1, 4), (2, 2), (2, 1), (1, 1))):
        x = convolve(x, index, stride, length)
    # (frames, 1, 128): the frames are the time of a single sequence.
    lstm = [
        constant("w_ih", gates("decoder.rnn.weight_ih")[None]),
        constant("w_hh", gates("decoder.rnn.weight_hh")[None]),
        constant("b", np.concatenate([gates("decoder.rnn.bias_ih"),
                                      gates("decoder.rnn.bias_hh")])[None]),
    ]  # fmt: skip
    nodes.append(
        helper.make_node(
            "LSTM", [x, *lstm, "", "h", "c"], ["hidden", "h_out", "c_out"], hidden_size=128
        )
    )
    x = add("Relu", ["hidden"], "active")
    x = add("Squeeze", [x, constant("axes12", np.array([1, 2]))], "rows")
    weight = constant("w_out", weights["decoder.decoder.2.weight"][0])
    bias = constant("b_out", weights["decoder.decoder.2.bias"])
    x = add("Gemm", [x, weight, bias], "logit")
    x = add("Sigmoid", [x], "sigmoid")
    add("Squeeze", [x, "axis1"], "probability")

    def value(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state = [1, 1, 128]
    graph = helper.make_graph(
        nodes,
        "silero_vad_16k",
        [value("input", ["frames", 576]), value("h", state), value("c", state)],
        [value("probability", ["frames"]), value("h_out", state), value("c_out", state)],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8,
        producer_name="speechrnt tools/simplify_vad.py",
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    onnx.save(build(read_weights(arguments.source)), arguments.target)
