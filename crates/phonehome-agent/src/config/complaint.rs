//! What is said about a value that an option cannot have: where it was given, and what would do.

use std::{error::Error, ffi::OsStr};

use clap::{
    Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::args::Unfit;

/// Puts clap's words for a wrong value in better ones; what is wrong with the form of the line it says well itself.
/// `place` knows where an option's value was given, by the option's name and variable.
pub(super) fn about(
    usage: clap::Error,
    command: &Command,
    place: impl FnOnce(&str, Option<&OsStr>) -> String,
) -> clap::Error {
    let text = |kind| match usage.get(kind) {
        Some(ContextValue::String(text)) => Some(text),
        _ => None,
    };
    let (Some(shown), Some(value)) = (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue)) else {
        return usage;
    };
    let Some(arg) = command.get_arguments().find(|arg| arg.to_string() == *shown) else { return usage };
    let Some(why) = why(&usage).filter(|_| !value.is_empty()) else { return usage };
    let place = place(arg.get_long().unwrap_or_default(), arg.get_env());
    let value = if arg.is_hide_env_values_set() { "the value".to_owned() } else { format!("'{value}'") };
    clap::Error::raw(usage.kind(), format!("{place}: {value}{why}\n"))
}

/// What follows the value.
fn why(usage: &clap::Error) -> Option<String> {
    if let Some(ContextValue::Strings(valid)) = usage.get(ContextKind::ValidValue) {
        return Some(format!(" is none of {}", valid.join(", ")));
    }
    let source = usage.source().filter(|_| usage.kind() == ErrorKind::ValueValidation)?;
    Some(match source.downcast_ref::<Unfit>() {
        Some(unfit) => format!(" is {unfit}"),
        None => format!(": {source}"),
    })
}
