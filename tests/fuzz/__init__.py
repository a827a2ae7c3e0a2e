"""Random calls of everything public, held to the float64 reference by the budgets of tests/helpers/oracle.py.

    choices.py    where choices come from: hypothesis, which shrinks, or a seed, which costs a microsecond a choice
    layouts.py    how a tensor lies in memory, and what state the process is in
    problems.py   what is computed, described and made: of pairs.py (which keys count: negatives.py), distillations.py,
                  layers.py; embeddings are of points.py
    truths.py     a problem and what is true of it: values, gradients, how far rounding may lead
    calls.py      one call of a problem: backend, layouts, states, gradients; and its judgement
    invalid.py    calls that must be refused by name
    readers.py    files that are damaged
    __main__.py   long runs in child processes: python -m fuzz --minutes 5, with tests/helpers:tests on PYTHONPATH

What makes it fast: the truth (float64, N x N, autograd) costs ten times a small call, and backend, layout, state and
route must not change a value. So one problem with one truth serves several calls. Eager's own error is only measured
where a call is further from the truth than the rounding band alone allows, which is rare. Every call is compared with
its truth, but for those where a rounding decides something discrete (Problem.settled): these must be finite.

A case is a dict of plain values: it can be written down before it is run, and read back.
"""
