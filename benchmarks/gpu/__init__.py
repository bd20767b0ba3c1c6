"""The GPU kernels on an NVIDIA card: checked, run under compute-sanitizer, timed beside their baselines; one call.

Run with: make gpu, or from benchmarks/: python -m gpu [--quick] [--parts NAME ...] [--seconds S] [--json FILE]
Takes under 9 minutes; --quick, a smoke test, under 3. Each part runs in a process of its own and has a share of the
time; what it wrote until it failed or its time ran out stays. FILE gets every figure, FILE with the ending .txt the
tables, and docs/update_gpu.py puts both into docs/.

- checks: every kernel against float64 with outputs that hold NaN before the call and inputs drawn anew in every run;
  the same bits twice; and captured in a CUDA graph that is replayed over other inputs. The bound of each element is
  that of `offpath.cost.bounds`. No time is reported of a kernel that fails.
- sanitizer: the same checks on small shapes under memcheck and racecheck, where compute-sanitizer is installed. Both
  tools first have to find a mistake made on purpose.
- topk, autoencoder, decode, tiles, expand, live, step, layers: times. Sides are timed in turns, each from a CUDA graph
  of many calls where all of them can be captured, over copies of their operands that are together larger than twice the
  L2 cache: medians of many rounds. Above 1, offpath is faster. The autoencoders run as they do for a user, and once
  more from graphs; before that, what must not wait for the device runs where torch refuses every wait.

With TRITON_INTERPRET=1 and without a GPU, `--parts checks` runs the Triton kernels on tiny shapes in Triton's
interpreter, and times nothing.
"""
