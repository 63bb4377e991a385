"""The choice of an attention backend, the table behind it, and our calls of packages that need a GPU."""

import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.attention.varlen
from torch._dynamo.testing import CompileCounter
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import ochat_train.model.attention
from ochat_train.model.attention import BACKENDS, TABLE, AttentionNeeds, Backend, Support, choose_backend, register
from ochat_train.model.masks import packed_mask
from ochat_train.recipe import ModelSection
from tests.flash_stand_ins import (
    PACKAGES,
    flash_attn_2_8_3,
    flash_attn_3_0_0b1,
    flash_attn_3_with_sums,
    flash_attn_4_0_0b36,
    flash_attn_4_of_2_8_3,
    install,
    varlen_attn_2_11,
    varlen_attn_2_13,
    varlen_backward,
)
from tests.test_attention import BATCHES, borders, check_against_naive, make_layer, random_qkv
from tests.test_docs import RECIPES, table

# ------------------------------------------------------------------------------------------------ the choice

A100, RTX_4090, H100, B200, RTX_5090 = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
ALL = tuple(name.replace(".", "__") for name in PACKAGES)


def needs(**changes: Any) -> AttentionNeeds:
    usual: dict[str, Any] = {"capability": H100, "dtype": torch.bfloat16, "head_dim": 128, "has_softcap": False}
    return AttentionNeeds(**(usual | changes))


@pytest.fixture
def packages_are(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these packages present, as stand-ins, and the others absent, whatever this machine has."""

    def pretend(*names: str) -> None:
        install(monkeypatch, **{name: PACKAGES[name.replace("__", ".")] for name in names})

    return pretend


def test_auto_on_a_cpu_takes_sdpa_and_says_why_not_the_others(packages_are: Callable[..., None]) -> None:
    packages_are(*ALL)
    choice = choose_backend("auto", needs(capability=None))
    assert choice.backend == "sdpa"
    assert choice.reason == "flash_attn_4, flash_attn_3, flash_attn, torch: needs a CUDA device"


CHOICES: list[tuple[tuple[str, ...], dict[str, Any], Backend, str]] = [
    # The fastest that the GPU has.
    (ALL, {"capability": A100}, "flash_attn", "flash_attn_3: needs a GPU of compute capability 9.x, this one has 8.0"),
    (ALL, {"capability": RTX_4090}, "flash_attn", "this one has 8.9"),
    (ALL, {"capability": H100}, "flash_attn_3", "flash_attn_4: needs a GPU of compute capability 10.x"),
    (ALL, {"capability": B200}, "flash_attn_4", "first choice"),
    (ALL, {"capability": RTX_5090}, "flash_attn", "this one has 12.0"),
    # What is installed.
    ((), {}, "torch", "flash_attn_interface is not installed (flash-attn-3 from"),
    ((), {}, "torch", "flash_attn is not installed (pip install --no-build-isolation flash-attn)"),
    ((), {"capability": B200}, "torch", "flash_attn.cute is not installed (pip install flash-attn-4)"),
    (("flash_attn",), {}, "flash_attn", "flash_attn_interface is not installed"),
    (("flash_attn",), {"capability": B200}, "flash_attn", "flash_attn.cute is not installed"),
    # flash-attn-4 alone leaves a package flash_attn, which is not FlashAttention 2. On Hopper it must be asked for.
    (("flash_attn__cute",), {}, "torch", "flash_attn has no flash_attn_varlen_func: not installed"),
    # What the model needs.
    ((), {"dtype": torch.float16}, "torch", ""),
    ((), {"has_softcap": True}, "sdpa", "torch: no softcap"),
    (ALL, {"has_sinks": True}, "torch", "flash_attn_3, flash_attn: no attention sinks"),
    ((), {"head_dim": 320}, "sdpa", "head size 320 is above 256"),
    ((), {"head_dim": 100}, "sdpa", "torch: head size 100 is no multiple of 8"),
    ((), {"dtype": torch.float32}, "sdpa", "needs bfloat16 or float16, not float32"),
    (ALL, {"has_softcap": True}, "flash_attn_3", ""),
    (ALL, {"head_dim": 256}, "flash_attn_3", ""),
    (ALL, {"head_dim": 100}, "flash_attn", "flash_attn_3: head size 100 is no multiple of 8"),
    (ALL, {"head_dim": 320}, "sdpa", "flash_attn_3, flash_attn, torch: head size 320 is above 256"),
    (ALL, {"dtype": torch.float32}, "sdpa", "flash_attn_3, flash_attn, torch: needs bfloat16 or float16"),
    (ALL, {"capability": B200, "head_dim": 256}, "flash_attn", "flash_attn_4: head size 256 is above 128"),
    (ALL, {"capability": B200, "has_softcap": True}, "flash_attn", "flash_attn_4: no softcap"),
    # A GPU that none of them knows.
    (ALL, {"capability": (7, 5)}, "sdpa", "flash_attn, torch: needs a GPU of compute capability 8.0 to 12.x, this one"),
]


@pytest.mark.parametrize(("present", "changes", "backend", "reason"), CHOICES)
def test_auto_takes_the_first_backend_that_can(
    packages_are: Callable[..., None], present: tuple[str, ...], changes: dict[str, Any], backend: Backend, reason: str
) -> None:
    packages_are(*present)
    choice = choose_backend("auto", needs(**changes))
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.parametrize(("error", "told"), [(ImportError("undefined symbol"), "undefined symbol"), (None, "cutlass")])
def test_a_package_that_cannot_be_imported_is_passed_over(
    packages_are: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: ImportError | None, told: str
) -> None:
    """The usual failures: built for another version of torch, and without its own dependencies."""
    packages_are()

    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "flash_attn":
                raise error or ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    choice = choose_backend("auto", needs(capability=A100))
    assert choice.backend == "torch"
    assert "flash_attn: flash_attn cannot be imported: " in choice.reason and told in choice.reason


def test_a_version_without_an_argument_that_we_pass_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn=flash_attn_2_8_3, flash_attn__cute=flash_attn_4_of_2_8_3)
    choice = choose_backend("auto", needs(capability=B200))
    assert choice.backend == "flash_attn"
    assert "flash_attn.cute takes no max_seqlen_k, max_seqlen_q: another version is needed" in choice.reason


REFUSALS: list[tuple[Backend, dict[str, Any], str]] = [
    ("flash_attn_4", {"capability": A100}, "compute capability 9.0 to 11.x, this one has 8.0"),
    ("flash_attn_4", {"capability": RTX_5090}, "compute capability 9.0 to 11.x, this one has 12.0"),
    ("flash_attn_4", {"head_dim": 192}, "head size 192 is above 128"),
    ("flash_attn_3", {"capability": A100}, "compute capability 9.x, this one has 8.0"),
    ("flash_attn_3", {"capability": B200}, "compute capability 9.x, this one has 10.0"),
    ("flash_attn_3", {"head_dim": 264}, "head size 264 is above 256"),
    ("flash_attn", {"capability": (7, 5)}, "compute capability 8.0 to 12.x, this one has 7.5"),
    ("torch", {"capability": None}, "needs a CUDA device"),
    ("torch", {"has_softcap": True}, "no softcap"),
    ("torch", {"head_dim": 257}, "head size 257 is above 256"),
    ("torch", {"dtype": torch.float32}, "not float32"),
    ("torch_fa3", {"capability": A100}, "compute capability 9.x, this one has 8.0"),
    ("torch_fa3", {"has_softcap": True}, "no softcap"),
]


@pytest.mark.parametrize(("wanted", "changes", "reason"), REFUSALS)
def test_a_backend_that_cannot_is_refused_with_the_remedy(
    packages_are: Callable[..., None], wanted: Backend, changes: dict[str, Any], reason: str
) -> None:
    packages_are(*ALL)
    with pytest.raises(ValueError) as error:
        choose_backend(wanted, needs(**changes))
    assert str(error.value).startswith(f"model.attention {wanted} cannot be used here: ")
    assert reason in str(error.value) and str(error.value).endswith("; set model.attention: auto")


@pytest.mark.parametrize("wanted", [backend for backend in BACKENDS if backend not in ("torch", "sdpa", "alone")])
def test_a_package_that_is_not_there_is_refused_with_what_to_install(
    packages_are: Callable[..., None], wanted: Backend
) -> None:
    packages_are()
    with pytest.raises(ValueError, match=r"is not installed \((pip install|flash-attn-3 from)"):
        choose_backend(wanted, needs())


def test_a_backend_that_can_is_taken_as_asked(packages_are: Callable[..., None]) -> None:
    packages_are(*ALL)
    for wanted in BACKENDS:
        assert choose_backend(wanted, needs()).backend == wanted
    assert choose_backend("flash_attn_4", needs(has_softcap=True)).backend == "flash_attn_4"
    odd = needs(capability=None, dtype=torch.float32, head_dim=321, has_softcap=True)
    assert choose_backend("sdpa", odd).backend == "sdpa"


def test_every_automatic_row_is_taken_by_auto_somewhere(packages_are: Callable[..., None]) -> None:
    packages_are(*ALL)
    taken = set()
    for present in ((), ALL):
        packages_are(*present)
        for capability in (None, A100, H100, B200):
            taken.add(choose_backend("auto", needs(capability=capability)).backend)
    assert taken == {row.backend for row in TABLE if row.is_automatic}


# ------------------------------------------------------------------------------------------------ the table


def cells(row: Support) -> list[str]:
    """A row of TABLE as the documentation writes it."""
    if row.head_dims is None:
        sizes = "any"
    else:
        largest, multiple = row.head_dims
        sizes = f"to {largest}" + (f", multiples of {multiple}" if multiple > 1 else "")
    return [
        row.backend,
        row.capabilities,
        "any" if row.majors is None else "bfloat16, float16",
        sizes,
        "yes" if row.has_softcap else "no",
        "yes" if row.has_sinks else "no",
        "yes" if row.is_automatic else "no",
        "nothing" if row.module is None else f"`{row.module}`: {row.install}",
    ]


def test_the_documentation_has_the_table() -> None:
    columns = ("backend", "compute capability", "dtypes", "head sizes", "softcap", "sinks", "auto", "needs")
    written = [[row[0].strip("`"), *row[1:]] for row in table(RECIPES, *columns)]
    assert written == [cells(row) for row in TABLE]


def test_the_recipe_knows_the_backends_of_the_table() -> None:
    annotation = ModelSection.model_fields["attention"].annotation
    assert get_args(annotation) == ("auto", *BACKENDS)
    assert {row.backend for row in TABLE} == set(BACKENDS)


# ------------------------------------------------------------------------------------------------ our calls

# Against the formula in f64, as sdpa in test_attention.py. What is called are the stand-ins of flash_stand_ins.py.
VERSIONS = [
    pytest.param("flash_attn", "flash_attn", flash_attn_2_8_3, id="flash-attn-2.8.3"),
    pytest.param("flash_attn_3", "flash_attn_interface", flash_attn_3_0_0b1, id="flash-attn-3.0.0b1"),
    pytest.param("flash_attn_3", "flash_attn_interface", flash_attn_3_with_sums, id="flash-attn-3-with-sums"),
    pytest.param("flash_attn_4", "flash_attn__cute", flash_attn_4_0_0b36, id="flash-attn-4.0.0b36"),
    pytest.param("torch", None, varlen_attn_2_11, id="torch-2.11"),
    pytest.param("torch", None, varlen_attn_2_13, id="torch-2.13"),
]
CASES: list[dict[str, Any]] = [
    {"heads": 4, "kv_heads": 4},
    {"heads": 6, "kv_heads": 1},
    {"scale": 0.7},
    {"window": 1},
    {"window": 5},
    {"window": 22},
    {"window": 1000},
    {"softcap": 2.0},
    {"softcap": 2.0, "window": 5},
    {"has_sinks": True},
    {"has_sinks": True, "window": 5, "scale": 0.7},
    {"lengths": (1, 1, 1)},
    {"lengths": (40,)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "package", "function"), VERSIONS)
def test_our_call_of_it_means_the_formula(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, package: str | None, function: Any, case: dict[str, Any]
) -> None:
    if package is None:
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", function)
    else:
        install(monkeypatch, **{package: function})
    case = dict(case)
    sizes = {name: case.pop(name) for name in ("heads", "kv_heads") if name in case}
    lengths = case.get("lengths", (5, 1, 23, 16, 1))
    monkeypatch.setattr(ochat_train.model.attention, "torch_backward", varlen_backward)
    if "has_sinks" in case and backend != "torch":
        assert not any(row.has_sinks for row in TABLE if row.backend == backend)
        return
    if backend == "torch" and "softcap" in case:
        assert not any(row.has_softcap for row in TABLE if row.backend == "torch")
        return
    check_against_naive(*random_qkv(lengths, **sizes), backend=backend, **case)


def test_the_kernels_of_flash_attention_3_are_put_into_torch_and_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str] = []
    ours = ochat_train.model.attention
    monkeypatch.setattr(ours, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(ours, "current_flash_attention_impl", lambda: active[-1] if active else None)
    monkeypatch.setattr(ours, "restore_flash_attention_impl", active.clear)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn_2_13)
    check_against_naive(*random_qkv(), backend="torch_fa3", window=5)
    assert active[-1] == "FA3"
    register("torch")
    assert not active


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "alone"])
def test_transformers_asks_us_for_masks_and_takes_our_name_for_none_of_its_own(
    packages_are: Callable[..., None], monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    packages_are(*ALL)
    monkeypatch.setattr(ochat_train.model.attention, "activate_flash_attention_impl", lambda _: None)
    name = register(backend)
    assert name in AttentionInterface()
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is packed_mask
    assert not any(own in name for own in ("flash", "sdpa", "flex", "eager", "paged"))


@pytest.mark.parametrize(
    ("backend", "package"), [("flash_attn_4", "flash_attn__cute"), ("flash_attn_3", "flash_attn_interface")]
)
def test_a_compiled_layer_does_not_look_into_a_package_that_torch_cannot_trace(
    packages_are: Callable[..., None], backend: Backend, package: str
) -> None:
    """The stand-in of 4 raises when it is traced. This 3 is a build without operators of torch."""
    packages_are(package)
    layer = make_layer(register(backend))
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    for lengths in BATCHES:
        arguments = (torch.randn(1, sum(lengths), 256), borders(lengths), max(lengths))
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.frame_count <= 4


def test_torch_has_the_implementation_that_we_activate() -> None:
    assert "FA3" in torch.nn.attention.list_flash_attention_impls()
