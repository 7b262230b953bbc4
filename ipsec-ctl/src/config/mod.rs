//! The configuration file: schema, validation, and diagnostics that point at the line.
