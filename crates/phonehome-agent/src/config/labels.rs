//! Who and what a build is, for those who look for it later: the options of its labels, typed and checked.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use phonehome_proto::limits::MAX_LABEL;

/// The options as typed.
#[derive(Debug, Default, Clone, Args)]
pub struct LabelsArgs {
    /// A label of this build, shown and searched at the server. May be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label, help_heading = "Labels")]
    pub label: Vec<(String, String)>,

    /// Several labels at once, separated by commas. --label wins over it, key by key
    #[arg(long = "labels", env = "PHONEHOME_LABELS", value_name = "KEY=VALUE,...", value_parser = list, help_heading = "Labels")]
    pub list: Option<LabelList>,

    /// File of the Kubernetes Downward API with the pod's labels; read again whenever it changes
    #[arg(long, env = "PHONEHOME_LABELS_FILE", value_name = "PATH", help_heading = "Labels")]
    pub labels_file: Option<PathBuf>,

    /// The same with the pod's annotations, which become labels that begin with `annotation.`
    #[arg(long, env = "PHONEHOME_ANNOTATIONS_FILE", value_name = "PATH", help_heading = "Labels")]
    pub annotations_file: Option<PathBuf>,
}

/// Labels in one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelList(Vec<(String, String)>);

/// Where labels come from, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelsConfig {
    /// Those given by options, which win.
    pub explicit: BTreeMap<String, String>,
    /// What the variables of a pod tell about it.
    pub identity: BTreeMap<String, String>,
    /// File of labels.
    pub labels_file: Option<PathBuf>,
    /// File of annotations.
    pub annotations_file: Option<PathBuf>,
}

impl From<LabelsArgs> for LabelsConfig {
    fn from(args: LabelsArgs) -> Self {
        let list = args.list.map(|LabelList(list)| list).unwrap_or_default();
        Self {
            explicit: list.into_iter().chain(args.label).collect(),
            identity: BTreeMap::new(),
            labels_file: args.labels_file,
            annotations_file: args.annotations_file,
        }
    }
}

impl LabelsConfig {
    /// Adds what variables tell about the pod, the container and the node. An empty one tells nothing.
    #[must_use]
    pub fn identified(mut self, variable: impl Fn(&str) -> Option<String>) -> Self {
        let told = |names: &[&str]| names.iter().find_map(|name| variable(name).filter(|value| !value.is_empty()));
        let labels = IDENTITY.into_iter().filter_map(|(key, names)| Some((key.to_owned(), told(names)?)));
        self.identity = labels.collect();
        self
    }
}

/// Labels by the names of OpenTelemetry's semantic conventions for resources (`k8s.*`), and the variables that tell
/// them, the first one first. Those of kubexit are for images that were built for it.
const IDENTITY: [(&str, &[&str]); 6] = [
    ("k8s.container.name", &["CONTAINER_NAME"]),
    ("k8s.namespace.name", &["POD_NAMESPACE", "NAMESPACE", "KUBEXIT_NAMESPACE"]),
    ("k8s.node.name", &["NODE_NAME"]),
    ("k8s.pod.ip", &["POD_IP"]),
    ("k8s.pod.name", &["POD_NAME", "KUBEXIT_POD_NAME"]),
    ("k8s.pod.uid", &["POD_UID"]),
];

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    if key.trim().is_empty() {
        return Err(format!("{text:?} has no key before its ="));
    }
    if key.len() + value.len() > MAX_LABEL {
        return Err(format!("the label {key:?} has more than {MAX_LABEL} bytes; make it shorter"));
    }
    Ok((key.trim().to_owned(), value.to_owned()))
}

/// Spaces around a pair and a comma at the end are layout of a manifest, not a part of a label.
fn list(text: &str) -> Result<LabelList, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs
        .map(label)
        .collect::<Result<_, _>>()
        .map(LabelList)
        .map_err(|why| format!("{why}; a value with a comma needs a --label of its own"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn labels_are_pairs_and_those_with_a_flag_of_their_own_win() {
        let config = config(&["--label", "a=1=1,x", "--labels", "a=2, b=3 ,", "--label", "c="]).unwrap();
        assert_eq!(config.explicit, map(&[("a", "1=1,x"), ("b", "3"), ("c", "")]));
    }

    #[test]
    fn what_is_no_label_is_told_with_what_to_do() {
        let long = format!("k={}", "v".repeat(MAX_LABEL));
        for (args, expected) in [
            (["--label", "novalue"], "is not KEY=VALUE"),
            (["--label", "=v"], "no key"),
            (["--labels", "a=b,c"], "--label of its own"),
            (["--label", &long], "make it shorter"),
        ] {
            let told = config(&args).unwrap_err().to_string();
            assert!(told.contains(expected), "{told}");
        }
    }

    #[test]
    fn a_pod_is_known_by_its_variables_and_their_synonyms() {
        let variables = map(&[
            ("POD_NAME", ""),
            ("KUBEXIT_POD_NAME", "builder-0"),
            ("NAMESPACE", "builds"),
            ("KUBEXIT_NAMESPACE", "old"),
            ("POD_IP", "10.0.0.7"),
            ("NODE_NAME", "node-3"),
        ]);
        let config = LabelsConfig::default().identified(|name| variables.get(name).cloned());
        let expected = [
            ("k8s.pod.name", "builder-0"),
            ("k8s.namespace.name", "builds"),
            ("k8s.pod.ip", "10.0.0.7"),
            ("k8s.node.name", "node-3"),
        ];
        assert_eq!(config.identity, map(&expected));
    }

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        labels: LabelsArgs,
    }

    fn config(args: &[&str]) -> Result<LabelsConfig, clap::Error> {
        let line = Line::try_parse_from(std::iter::once(&"agent").chain(args))?;
        Ok(line.labels.into())
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }
}
