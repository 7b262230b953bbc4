//! What is wrong with a configuration, shown with its line and the remedy.

use std::{io, ops::Range};

use miette::{Diagnostic, LabeledSpan, NamedSource};

/// All that is wrong with one configuration file.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{summary}")]
pub struct ConfigErrors {
    summary: String,
    #[help]
    help: Option<String>,
    #[related]
    problems: Vec<Located>,
}

/// A problem together with the text it is in, as miette wants it.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{message}")]
struct Located {
    message: String,
    #[source_code]
    source_code: NamedSource<String>,
    #[label(collection)]
    labels: Vec<LabeledSpan>,
    #[help]
    help: Option<String>,
}

/// One problem: what, where, and what to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, lower case.
    pub message: String,
    /// Places in the text, each with its own words.
    pub labels: Vec<(Range<usize>, String)>,
    /// What to write instead.
    pub help: Option<String>,
}

impl Problem {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            labels: Vec::new(),
            help: None,
        }
    }

    pub(super) fn at(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.labels.push((span, label.into()));
        self
    }

    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Turns a parser's error into ours; a misspelt key gets the nearest one as its remedy.
    pub(super) fn from_toml(error: &toml::de::Error) -> Self {
        let message = error.message();
        let help = nearest_expected(message)
            .map(|name| {
                format!("did you mean `{name}`? docs/configuration.md lists every key and value")
            })
            .or_else(|| secret_hint(message))
            .or_else(|| kind_hint(message).map(str::to_owned));
        Self {
            message: message.to_owned(),
            labels: error
                .span()
                .map(|span| (span, "here".to_owned()))
                .into_iter()
                .collect(),
            help,
        }
    }
}

/// What the kinds of values look like, where serde's words for another kind do not tell.
fn kind_hint(message: &str) -> Option<&'static str> {
    let (_, wanted) = message.split_once(", expected ")?;
    if wanted.starts_with("a sequence") {
        return Some("a list is written in brackets, with commas between: [\"one\", \"two\"]");
    }
    if wanted.starts_with("a string") {
        return Some("text is written in quotes: \"10m\", \"10.1.0.0/24\"");
    }
    if wanted.starts_with("a boolean") {
        return Some("true or false, without quotes");
    }
    ["u16", "u32", "u64"]
        .contains(&wanted.trim())
        .then_some("a whole number, without quotes")
}

/// A key inside the file is a leak waiting for a backup; the remedy is worth its own words.
fn secret_hint(message: &str) -> Option<String> {
    ["`psk`", "`secret`", "`password`", "`key`"].iter().any(|key| message.contains(key)).then(|| {
        "the configuration holds no secrets: put the key into a file of mode 0600 and name it with psk_file".to_owned()
    })
}

/// Finds the expected name nearest to the unknown one in serde's message, if it is near at all.
fn nearest_expected(message: &str) -> Option<String> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = message.starts_with("unknown ").then(|| quoted.next())??;
    if secret_hint(message.split(',').next()?).is_some() {
        return None;
    }
    let (distance, name) = quoted
        .map(|name| (strsim::levenshtein(unknown, name), name))
        .min()?;
    (distance <= unknown.len().div_ceil(3)).then(|| name.to_owned())
}

impl ConfigErrors {
    pub(super) fn new(name: &str, text: &str, problems: Vec<Problem>) -> Self {
        let count = match problems.len() {
            1 => "a problem".to_owned(),
            more => format!("{more} problems"),
        };
        Self {
            summary: format!("{count} in {name}; nothing was changed"),
            help: None,
            problems: problems
                .into_iter()
                .map(|problem| Located::new(name, text, problem))
                .collect(),
        }
    }

    pub(super) fn unreadable(name: &str, cause: &io::Error) -> Self {
        Self {
            summary: format!("the configuration {name} cannot be read: {cause}"),
            help: Some(
                if cause.kind() == io::ErrorKind::PermissionDenied {
                    "become root, for instance with sudo"
                } else {
                    "name a file that exists and can be read; README.md has one to start from"
                }
                .to_owned(),
            ),
            problems: Vec::new(),
        }
    }

    /// The messages alone, for the log.
    pub fn messages(&self) -> impl Iterator<Item = &str> {
        self.problems.iter().map(|problem| problem.message.as_str())
    }
}

impl Located {
    fn new(name: &str, text: &str, problem: Problem) -> Self {
        Self {
            message: problem.message,
            source_code: NamedSource::new(name, text.to_owned()),
            labels: problem
                .labels
                .into_iter()
                .map(|(span, label)| LabeledSpan::at(span, label))
                .collect(),
            help: problem.help,
        }
    }
}
