"""The whole package takes its CUDA path on a machine without one.

A stand-in device (`device`, with `tensors` and `methods`) gives tensors that say they lie on "cuda:0" and compute on
the CPU. So a model is made, encoded and served there as on a GPU, by the same branches, and what it answers is held
against the plain model. An operator of the package on such tensors (`operators`) runs its launcher; the launches are
recorded as Triton's JIT would see them (`specialisation`), and the operator's reference gives the values. What was
recorded is compiled (`compilation`) for GPUs that need not be here. `settings` says of which models, `requests` says
what is asked, and `rehearsal` brings them together.

`python -m bench.rehearsal`, or `make rehearse`, does all of it.
"""
