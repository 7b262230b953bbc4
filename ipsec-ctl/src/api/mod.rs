//! The control socket: HTTP and JSON over a Unix socket, both halves.
