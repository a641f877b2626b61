"""Learning methods: one file per objective, all under the contract of `base.Method`."""
