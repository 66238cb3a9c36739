//! Executes a plan on the CPU (rayon). Placeholder: see the module's owner.
