"""Folded and plain networks against the model; programs, ONNX and column files; the commands that write them."""

import json
import sys
import warnings

import pytest
import torch
from torch import nn

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
safetensors = pytest.importorskip("safetensors.torch")
safe_open = pytest.importorskip("safetensors").safe_open

from fractalnet import FractalNet, PlainNet, create, export, sources  # noqa: E402
from fractalnet import trained as trained_files  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402

CONFIG = {"num_classes": 7, "columns": 3, "channels": (4, 6), "image_size": 8}


def trained(**options):
    """In evaluation, with statistics and affines far from their initial values, different in every set and unit."""
    net = FractalNet(**{**CONFIG, **options})
    with torch.no_grad():
        for block in net.blocks:
            block.running_mean.normal_(0, 0.5)
            block.running_var.uniform_(0.2, 3)
            for parameter in (block.gamma, block.beta, block.conv_bias):
                if parameter is not None:
                    parameter.uniform_(0.3, 1.5)
    return net.eval()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def images(n=5, dtype=torch.float32):
    return torch.randn(n, 3, 8, 8, dtype=dtype)


OPTIONS = [
    {},
    {"conv_bias": True, "dropout": (0.0, 0.3)},
    {"bn_affine": False, "split_stats": False},
    {"pool_order": "after_join", "conv_bias": True, "bn_affine": False, "eps": 0.01},
]


# --- plain modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folded_column(options, dtype, most):
    net, x = trained(**options).to(dtype), images(dtype=dtype)
    for column in range(3):
        folded = net.extract_column(column, fold=True)
        kinds = {type(layer).__name__ for layer in folded}
        assert kinds == {"Conv2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Linear"}
        assert not folded.training and folded(x).dtype == dtype
        assert relative(folded(x), net(x, column=column)) <= most
        assert relative(net.extract_column(column)(x), net(x, column=column)) <= most


def test_fold_copies_and_keeps_what_has_no_convolution():
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.ReLU(),
        nn.BatchNorm2d(4),
    )  # fmt: skip
    net(images())  # training: the statistics move
    before = {name: t.clone() for name, t in net.state_dict().items()}
    folded = export.fold(net)
    assert [type(layer) for layer in folded] == [nn.BatchNorm2d, nn.Conv2d, nn.ReLU, nn.BatchNorm2d]
    assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    x = images()
    torch.testing.assert_close(folded(x), net.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_plain_full_network(options, columns, fold):
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        net, x = trained(columns=columns, **options).to(dtype), images(dtype=dtype)
        plain = export.plain(net, fold=fold)
        assert relative(plain(x), net(x)) <= most
    leaves = [m for m in plain.modules() if not list(m.children())]
    assert all(type(m).__module__.startswith("torch.nn.modules") for m in leaves)
    assert any(isinstance(m, nn.BatchNorm2d) for m in leaves) == (not fold)
    expected = plain(x)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    assert torch.equal(plain(x), expected)  # a copy


def test_a_network_in_training_is_left_in_training():
    net = FractalNet(**CONFIG, dropout=(0.5, 0.5))
    plain, folded, column = export.plain(net), net.extract_column(1, fold=True), net.extract_column(1)
    assert (net.training, plain.training, folded.training, column.training) == (True, False, False, True)
    x = images()
    net.eval()
    assert relative(plain(x), net(x)) <= 1e-5 and relative(folded(x), net(x, column=1)) <= 1e-5


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": (0.2, 0.0), "conv_bias": True, "pool": "avg", "last_pool": False},
        {"bn_affine": False, "eps": 0.01, "stem": "resnet"},
    ],
    ids=str,
)
def test_plain_of_a_plain_network(options, fold):
    net = PlainNet(7, 2, (4, 6), image_size=16, **options)
    net(torch.randn(8, 3, 16, 16))  # statistics move
    x = torch.randn(5, 3, 16, 16)
    plain = export.plain(net, fold=fold)
    assert net.training and not plain.training
    assert relative(plain(x), net.eval()(x)) <= 1e-5
    kinds = {type(m) for m in plain.modules() if not list(m.children())}
    assert all(kind.__module__.startswith("torch.nn.modules") for kind in kinds)
    assert (nn.BatchNorm2d in kinds) == (not fold) and (nn.Dropout in kinds) == ("dropout" in options and not fold)
    expected = plain(x)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    assert torch.equal(plain(x), expected)  # a copy


def test_columns_keep_their_momentum(tmp_path):
    net = FractalNet(**CONFIG, momentum=0.3)
    export.save_column(net, 1, tmp_path / "column")
    for column in (net.extract_column(1), export.load_column(tmp_path / "column")):
        assert {m.momentum for m in column if isinstance(m, nn.BatchNorm2d)} == {0.3}


# --- programs ----------------------------------------------------------------------------------------

WHAT = [(None, True, "before_join"), (None, False, "after_join"), (1, True, "before_join"), (2, False, "before_join")]


@pytest.mark.parametrize("column, fold, pool_order", WHAT)
def test_exported_program(tmp_path, column, fold, pool_order):
    net = trained(pool_order=pool_order)
    export.to_pt2(net, tmp_path / "net.pt2", column, fold=fold)
    program = torch.export.load(tmp_path / "net.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets)
    for n in (1, 2, 5):
        x = images(n)
        assert relative(program.module()(x), net(x, column=column)) <= 1e-5


def test_program_of_a_network_in_training():
    net, x = trained().train(), images()
    program = export.to_exported_program(net, column=0, fold=False).module()
    assert relative(program(x), net.eval()(x, column=0)) <= 1e-5


@pytest.mark.parametrize("column, fold, pool_order", WHAT)
def test_onnx(tmp_path, column, fold, pool_order):
    net, path = trained(pool_order=pool_order), tmp_path / "new" / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        export.to_onnx(net, path, column, fold=fold)
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (images_in,), (logits_out,) = session.get_inputs(), session.get_outputs()
    assert (images_in.name, images_in.shape) == ("images", ["batch", 3, 8, 8])
    assert (logits_out.name, logits_out.shape) == ("logits", ["batch", 7])
    for n in (0, 1, 3, 8):
        x = images(n)
        expected = net(x, column=column).detach()
        (got,) = session.run(None, {"images": x.numpy()})
        assert got.shape == (n, 7)
        error = (torch.from_numpy(got) - expected).abs()
        assert bool((error <= 1e-5 * expected.abs().clamp(min=1)).all())
    assert b"site-packages" not in path.read_bytes()  # no traces of the machine


@pytest.mark.parametrize("function", [export.to_exported_program, lambda net, c: export.to_onnx(net, "x.onnx", c)])
def test_programs_of_no_column(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="extract_column: expected c from 0 to 2, got 3"):
        function(trained(), 3)
    assert not list(tmp_path.iterdir())


def test_what_users_have_to_know():
    """Of images of which the mean alone was subtracted."""
    known = {"classes": ["cat"], "scale": 255.0, "mean": [0.5], "std": [0.2], "normalise": "mean"}
    assert trained_files.for_users({"data": known}) == {"classes": ["cat"], "scale": 255.0, "mean": [0.5], "std": [1.0]}


@pytest.mark.parametrize("function", [export.to_pt2, export.to_onnx, export.save_column])
@pytest.mark.parametrize("metadata", [["classes"], {"mean": torch.ones(3)}], ids=["list", "tensor"])
def test_metadata_that_json_does_not_know(function, metadata, tmp_path):
    with pytest.raises(
        ValueError, match=f"{function.__name__}: expected metadata None or a mapping of values that JSON"
    ):
        function(
            trained(), path=tmp_path / "x", metadata=metadata, **({"c": 1} if function is export.save_column else {})
        )
    assert not list(tmp_path.iterdir())


def test_metadata_of_names_that_are_no_unicode(tmp_path):
    """Such as a class folder's, which Python reads with surrogates."""
    export.to_pt2(trained(), tmp_path / "net.pt2", metadata={"classes": ["caf\udce9"]})
    torch.export.load(tmp_path / "net.pt2", extra_files=(held := {"classes": ""}))
    assert json.loads(held["classes"]) == ["caf\udce9"]


# --- columns as files --------------------------------------------------------------------------------


LAYERS = [{"activation": "silu", "pool": "avg"}, {"activation": "mish", "stem": "resnet", "image_size": 20}]
LAYERS += [{"activation": "leaky_relu", "dropout": (0.1, 0.2)}]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("options", OPTIONS + LAYERS)
def test_column_file(tmp_path, options, fold):
    net, path = trained(**options), tmp_path / "column.safetensors"
    export.save_column(net, 2, path, fold=fold)
    loaded, expected = export.load_column(path), net.extract_column(2, fold=fold)
    assert str(loaded) == str(expected.eval()) and not loaded.training
    assert all(type(m).__module__.startswith("torch.nn") for m in loaded.modules())
    assert torch.equal(loaded(images := torch.randn(4, 3, net.image_size, net.image_size)), expected(images))
    loaded.train()(images).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_column_file_of_half_and_channels_last(tmp_path):
    net = trained().to(memory_format=torch.channels_last).bfloat16()
    export.save_column(net, 1, tmp_path / "column")
    loaded, expected = export.load_column(tmp_path / "column").state_dict(), net.extract_column(1).state_dict()
    assert loaded["0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def tampered(layers, state, format=export.FORMAT):
    return safetensors.save(state, {"format": format, "layers": layers})


@pytest.mark.parametrize(
    "damage, words",
    [
        ("cut", "damaged or not"),
        ("noise", "damaged or not"),
        ("foreign", "expected format 'fractalnet column 1', got None"),
        ("other format", "got 'fractalnet column 2'"),
        ("unknown layer", "unknown layer 'Upsample' with scale_factor"),
        ("not a layer", "unknown layer '__loader__'"),
        ("arguments", "unknown layer 'Conv2d' with dtype, in_channels"),
        ("fewer arguments", "unknown layer 'Conv2d' with in_channels, out_channels, kernel_size, padding, bias"),
        ("missing weight", "Missing key"),
        ("other shape", "size mismatch for 0.weight"),
        ("no json", "Expecting value"),
        ("no list", "damaged or not"),
    ],
)
def test_what_is_no_column_file(tmp_path, damage, words):
    path = tmp_path / "column"
    export.save_column(trained(), 0, path)
    with safetensors.safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    state, text = safetensors.load_file(path), json.dumps(layers)
    wide = json.dumps([["Conv2d", {**layers[0][1], "in_channels": 10**9}], *layers[1:]])
    fewer = json.dumps([["Conv2d", {k: v for k, v in layers[0][1].items() if k != "stride"}], *layers[1:]])
    path.write_bytes(
        {
            "cut": path.read_bytes()[:-100],
            "noise": b"not a column" * 99,
            "foreign": safetensors.save(state),
            "other format": tampered(text, state, "fractalnet column 2"),
            "unknown layer": tampered(json.dumps([["Upsample", {"scale_factor": 2}], *layers]), state),
            "not a layer": tampered(json.dumps([["__loader__", {}]]), state),
            "arguments": tampered(json.dumps([["Conv2d", {"dtype": 1, "in_channels": 3}]]), state),
            "fewer arguments": tampered(fewer, state),
            "missing weight": tampered(text, {name: t for name, t in state.items() if name != "1.running_mean"}),
            "other shape": tampered(wide, state),
            "no json": tampered("", state),
            "no list": tampered("3", state),
        }[damage]
    )
    with pytest.raises(ValueError, match="load_column: .*column is damaged or not a column's file") as raised:
        export.load_column(path)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_no_column_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.load_column(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="extract_column: expected c from 0 to 2, got 3"):
        export.save_column(trained(), 3, tmp_path / "column")
    with pytest.raises(ValueError, match=r"save_column: expected metadata of other names .*, got \['layers'\]"):
        export.save_column(trained(), 1, tmp_path / "column", metadata={"layers": 2, "mean": 0.5})
    net = trained()
    net.head = nn.Sequential(net.head, nn.Softmax(1))
    with pytest.raises(ValueError, match="save_column: expected layers of Conv2d, .*, Linear, got Sequential"):
        export.save_column(net, 1, tmp_path / "column")
    assert not list(tmp_path.iterdir())


# --- commands ----------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, packed):
    net = trained()
    (tmp_path / "model.pt").write_bytes(packed(net, CONFIG))
    return net, str(tmp_path / "model.pt")


def test_commands(checkpoint, tmp_path, capfd):
    net, file = checkpoint
    x, out = images(), tmp_path / "new" / "out"
    assert main(["extract", "--checkpoint", file, "--column", "1", "--out", str(out)]) == 0
    assert torch.equal(export.load_column(out)(x), net.extract_column(1)(x))
    assert main(["extract", "--checkpoint", file, "--column", "2", "--fold", "--out", str(out)]) == 0
    assert torch.equal(export.load_column(out)(x), net.extract_column(2, fold=True)(x))
    for arguments, column in ((["--column", "0"], 0), ([], None)):
        assert main(["export", "--checkpoint", file, "--out", str(out.with_suffix(".pt2")), *arguments]) == 0
        said = dict.fromkeys(("classes", "scale", "mean", "std"), "")
        program = torch.export.load(out.with_suffix(".pt2"), extra_files=said)
        assert relative(program.module()(x), net(x, column=column)) <= 1e-5
        assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)  # folded
    assert main(["export", "--checkpoint", file, "--out", str(out.with_suffix(".onnx"))]) == 0
    session = ort.InferenceSession(out.with_suffix(".onnx").read_bytes(), providers=["CPUExecutionProvider"])
    assert relative(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), net(x)) <= 1e-5
    said = {name: json.loads(text) for name, text in said.items()}
    data = sources.load("digits")
    assert said == {"classes": list(data.classes), "scale": 16, "mean": list(data.mean), "std": list(data.std)}
    with safe_open(out, "pt") as column:
        headers = column.metadata(), session.get_modelmeta().custom_metadata_map
    for header in headers:
        assert {name: json.loads(header[name]) for name in said} == said
    said = capfd.readouterr()
    assert said.out.splitlines() == [f"wrote {out}"] * 2 + [f"wrote {out}.pt2"] * 2 + [f"wrote {out}.onnx"]
    assert said.err == ""
    assert sorted(f.name for f in out.parent.iterdir()) == ["out", "out.onnx", "out.pt2"]


def test_commands_of_a_plain_network(tmp_path, packed, refused):
    arguments = {"name": "plain_c2", "num_classes": 7, "channels": (4, 6), "image_size": 8}
    net, file = create(**arguments).eval(), tmp_path / "model.pt"
    file.write_bytes(packed(net, arguments))
    out = tmp_path / "net.pt2"
    assert main(["export", "--checkpoint", str(file), "--out", str(out)]) == 0
    program, x = torch.export.load(out), images()
    assert relative(program.module()(x), net(x)) <= 1e-5
    assert all(str(node.target).startswith("aten.") for node in program.graph.nodes if node.op == "call_function")
    for command in ("export", "extract"):
        argv = [command, "--checkpoint", str(file), "--column", "0", "--out", str(out)]
        refused(argv, ["expected a FractalNet", "a plain network, which has no columns"])
    with pytest.raises(ValueError, match="expected column None, as a plain network has no columns, got 0"):
        export.to_pt2(net, out, 0)


@pytest.mark.parametrize(
    "command, words",
    [
        ("extract --checkpoint FILE --column 3 --out DIR/out", ["--column", "0 to 2", "got 3"]),
        ("extract --checkpoint FILE --column -1 --out DIR/out", ["--column", ">= 0", "'-1'"]),
        ("extract --checkpoint FILE --out DIR/out", ["required: --column"]),
        ("extract --checkpoint DIR/none.pt --column 1 --out DIR/out", ["none.pt", "no such file"]),
        ("extract --checkpoint FILE --column 1 --out FILE/out", ["cannot write to the folder"]),
        ("extract --checkpoint FILE --column 1 --out DIR", ["cannot write to", "it is a folder"]),
        ("export --checkpoint FILE --column 3 --out DIR/out.onnx", ["--column", "0 to 2", "got 3"]),
        ("export --checkpoint FILE --out DIR/out.tflite", ["--out", ".onnx or .pt2", "'out.tflite'"]),
        ("export --checkpoint FILE --column 1 --out FILE/out.pt2", ["cannot write to the folder"]),
        ("export --checkpoint FILE --fold --out DIR/out.pt2", ["--fold", "--checkpoint, --column, --out"]),
    ],
)
def test_wrong_commands(checkpoint, tmp_path, refused, command, words):
    argv = command.replace("FILE", checkpoint[1]).replace("DIR", str(tmp_path)).split()
    refused(argv, words)
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    "command, package",
    [
        ("extract --column 1", "safetensors"),
        ("export", "onnx"),
        ("export", "onnxscript"),
    ],
)
def test_missing_packages(checkpoint, tmp_path, capsys, monkeypatch, command, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*command.split(), "--checkpoint", checkpoint[1], "--out", str(tmp_path / "out.onnx")]) == 2
    said = capsys.readouterr().err
    assert f"missing {package} (" in said and "pip install fractal-kernels[export]" in said
    assert len(said.splitlines()) == 1 and [f.name for f in tmp_path.iterdir()] == ["model.pt"]
