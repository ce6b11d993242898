"""Which parameters of a model are scale-invariant together: texp.audit and texp.param_groups."""
