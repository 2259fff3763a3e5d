"""Models: pure functions of parameters, inputs and edits, with named sites."""
