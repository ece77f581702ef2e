//! What a build is called: from the agent's options and its pod to the files of its attempt.

use std::{fs, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};

use crate::harness::{Hook, Process, eventually};

#[tokio::test]
async fn labels_are_stored_with_the_attempt_and_their_changes_with_its_events() {
    let mut hook = Hook::wait(&["--data", "data", "--build", "labelled"]).await;
    let gate = hook.scene.gate("gate");
    let volume = hook.scene.path("podinfo");
    project(&volume, "1", "app=\"shop\"\ntier=\"\\u00fc\\\"x\\\"\"");
    let options = ["--label", "commit=abc,def", "--labels-file", "podinfo/labels"];
    let mut command = hook.agent_command(&options, &gate.pass());
    command.envs([("PHONEHOME_LABELS", "commit=old,by=ci"), ("POD_NAME", "builder-0"), ("NAMESPACE", "builds")]);
    let mut agent = Process::spawn(&mut command);
    let attempt = hook.scene.path("data/builds/labelled/main/1");
    hook.scene.appears("data/builds/labelled/main/1/attempt.json").await;
    let owner: Value = serde_json::from_slice(&fs::read(attempt.join("attempt.json")).unwrap()).unwrap();
    let told = json!({"by": "ci", "commit": "abc,def", "k8s.pod.name": "builder-0", "k8s.namespace.name": "builds"});
    let with = |more: Value| {
        let mut labels = told.as_object().unwrap().clone();
        labels.extend(more.as_object().unwrap().clone());
        Value::Object(labels)
    };
    assert_eq!(owner["labels"], with(json!({"app": "shop", "tier": "ü\"x\""})));

    project(&volume, "2", "app=\"store\"");
    let changes = || -> Vec<Value> {
        let text = fs::read_to_string(attempt.join("events")).unwrap_or_default();
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event.to_string().contains("\"labels\"")).collect()
    };
    eventually("the change is stored", || !changes().is_empty()).await;
    gate.open();
    assert_eq!((hook.ended().await.code, agent.ended().await), (0, 0));
    let [change] = &changes()[..] else { panic!("{:?}", changes()) };
    assert!(change.to_string().contains(&with(json!({"app": "store"})).to_string()), "{change}");
}

/// As the kubelet fills a volume: by a rename of the link to the files.
fn project(volume: &Path, version: &str, labels: &str) {
    let data = volume.join(format!("..{version}"));
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("labels"), labels).unwrap();
    symlink(data.file_name().unwrap(), volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if fs::symlink_metadata(volume.join("labels")).is_err() {
        symlink("..data/labels", volume.join("labels")).unwrap();
    }
}
