//! The tests of `broker`: the contract on both twins, and what each twin has of its own.
//!
//! One program, so that it is linked once. The tests of `outages` start nodes of their own; `rabbit` and half of
//! `contract` use the run's node, each test in a virtual host of its own.

mod contract;
mod memory;
mod outages;
mod rabbit;
mod support;
