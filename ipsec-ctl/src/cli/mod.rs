//! Commands and their rendering: tables for people, JSON for programs.
