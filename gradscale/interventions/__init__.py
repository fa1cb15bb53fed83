"""Training methods of the literature, one step at a time.

All have one shape: `method.step(target, loss_fn, state)`, where `target` is a DeepSpeed engine or (model, optimizer).
It takes the place of the backward pass and the optimizer's step. `method` is a frozen setting, `state` all that is
remembered.
"""
