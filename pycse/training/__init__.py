"""Training and evaluation of sentence encoders: what `pycse train` and `pycse eval` run."""
