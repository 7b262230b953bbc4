//! Harness of the integration tests: namespaces, peers, captures.
