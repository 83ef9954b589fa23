"""Flags of XLA with which a program for CPUs compiles several times as fast; results differ by rounding only.

Most of the suite's time is the compiler's. LLVM's expensive passes are left out, and so are XLA's newer emitters of fusions,
which make an MLIR context for every few: 5.5 s became 1.8 for the gradient of a model of four layers (jaxlib 0.11.2). The older
ones write a stack anew where a loop updates one slice of it, so a loop that keeps something large at each turn runs slowly.
"""

XLA_FLAGS = (
    '--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0'
    ' --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters'
)
