"""Names of the arrays that implementations save for their own backward passes."""

# Name of the boundary states among the residuals, for `jax.checkpoint` policies: a policy
# that saves it (and the inputs) spares the backward pass a second forward pass.
STATES_NAME = 'ssd_states'
