//! End-to-end tests of both programs, in `e2e/`. This library is empty: cargo wants a package to have one.
