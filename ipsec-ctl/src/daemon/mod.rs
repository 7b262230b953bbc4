//! Wiring: the tokio tasks, timers and signals that join the IKE core to the data plane.
