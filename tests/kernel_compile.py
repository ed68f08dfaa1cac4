"""Compiles every Triton kernel for sm_90 (Hopper) without a GPU. JSON line: {kernel: {cubin, shared, target}}

test_kernels.py runs it in a process of its own, because a kernel decorated under the interpreter cannot be compiled.
Compiling shows that a kernel is legal for the target, not that it is right or fast.
"""

import importlib
import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

MODULES = ("composite", "voxel_vote", "selective_scan", "ms_deform_attn", "scatter_project")
BF16, LONG, BYTE, INT = "*bf16", "*i64", "*u8", "*i32"

# (module, kernel, compile-time constants, pointer types other than *fp32). What is no pointer is an i32.
TILE = {"BLOCK_T": 16, "BLOCK_D": 8, "BLOCK_N": 16, "TILES": 32}
VOTE = {"index_ptr": LONG, "label_ptr": BYTE, "current_ptr": BYTE, "row_ptr": LONG, "votes_ptr": LONG, "now_ptr": LONG,
        "count_ptr": INT, "voxel_ptr": LONG, "winner_ptr": BYTE, "total_ptr": INT}
PAIRS = {"voxel_ptr": LONG, "pair_ptr": LONG, "start_ptr": LONG}
KERNELS = [
    ("composite", "_forward", {"BLOCK_R": 16, "BLOCK_S": 128}, {}),
    ("composite", "_backward", {"BLOCK_R": 16, "BLOCK_S": 128}, {"sigma_ptr": BF16, "delta_ptr": BF16}),
    ("voxel_vote", "_count", {"UNIT": 65536, "WEIGHTED": True, "CURRENT": True, "BLOCK_M": 1024}, VOTE),
    ("voxel_vote", "_winner", {"CURRENT": True, "BLOCK_U": 256}, VOTE),
    ("selective_scan", "_summarise", {"REVERSE": False, **TILE}, {"x_ptr": BF16, "V_ptr": BF16}),
    ("selective_scan", "_summarise", {"REVERSE": True, **TILE}, {}),
    ("selective_scan", "_carry", {"REVERSE": False, "BLOCK_C": 64, "BLOCK_X": 32}, {}),
    ("selective_scan", "_carry", {"REVERSE": True, "BLOCK_C": 64, "BLOCK_X": 32}, {}),
    ("selective_scan", "_output", {"SAVE": True, **TILE}, {"u_ptr": BF16, "B_ptr": BF16, "C_ptr": BF16}),
    ("selective_scan", "_gradient", TILE, {}),
    ("ms_deform_attn", "_forward", {"BLOCK_Q": 32, "BLOCK_D": 32}, {"level_ptr": INT, "value_ptr": BF16}),
    ("ms_deform_attn", "_backward", {"BLOCK_Q": 32, "BLOCK_D": 32}, {"level_ptr": INT}),
    ("scatter_project", "_forward", {"ORDERED": True, "BLOCK_C": 32}, {**PAIRS, "value_ptr": BF16}),
    ("scatter_project", "_backward", {"ORDERED": True, "BLOCK_C": 32}, PAIRS),
]


def kernels_of(module) -> set[str]:
    """Names of the functions that are launched; the helpers they call know no program."""
    jitted = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    return {name for name, value in jitted.items() if "tl.program_id(" in value.src}


def main() -> None:
    modules = {name: importlib.import_module(f"common.kernels.{name}") for name in MODULES}
    missing = {(name, kernel) for name, module in modules.items() for kernel in kernels_of(module)}
    missing -= {entry[:2] for entry in KERNELS}
    if missing:
        raise SystemExit(f"kernels without an entry in KERNELS: {sorted(missing)}")
    report = {}
    for name, kernel, constants, types in KERNELS:
        function = getattr(modules[name], kernel)
        signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") if a.endswith("_ptr") else "i32"
                     for a in function.arg_names}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        flags = "".join(f" {flag}" for flag in ("REVERSE", "SAVE") if constants.get(flag))
        report[f"{name}.{kernel}{flags}"] = {"cubin": len(built.asm["cubin"]), "shared": built.metadata.shared,
                                             "target": ".target sm_90" in built.asm["ptx"]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
