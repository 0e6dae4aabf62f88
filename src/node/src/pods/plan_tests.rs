//! Each documented behaviour of a pod as a row: what the agent reports, what is to be done. And what holds for any report.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::pods::state::Sandbox;

const NOW: i64 = 1_800_000_000;

/// A pod of these init containers and containers, all of image `i:1`.
fn pod(policy: &str, inits: &[&str], mains: &[&str]) -> Pod {
    let of =
        |names: &[&str]| -> Vec<_> { names.iter().map(|n| json!({"name": n, "image": "i:1"})).collect() };
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "uid-1"},
        "spec": {"restartPolicy": policy, "initContainers": of(inits), "containers": of(mains)}}))
    .unwrap()
}

/// A container in a word: `NAME[:ATTEMPT][@SANDBOX]=STATE`, STATE one of created, running, unknown, exit code.
fn container(text: &str) -> Container {
    let (left, state) = text.split_once('=').unwrap();
    let (left, sandbox) = left.split_once('@').unwrap_or((left, "0"));
    let (name, attempt) = left.split_once(':').unwrap_or((left, "0"));
    let attempt: u32 = attempt.parse().unwrap();
    let (phase, exit_code) = match state {
        "created" => (Phase::Created, 0),
        "running" => (Phase::Running, 0),
        "unknown" => (Phase::Unknown, 0),
        code => (Phase::Exited, code.parse().unwrap()),
    };
    let finished_at = if phase == Phase::Exited { (NOW - 5) * 1_000_000_000 } else { 0 };
    Container {
        id: format!("{name}-{attempt}"),
        name: name.to_owned(),
        attempt,
        sandbox: format!("s{sandbox}"),
        phase,
        created_at: 1 + i64::from(attempt),
        started_at: 0,
        finished_at,
        exit_code,
        reason: String::new(),
        message: String::new(),
        image: "i:1".to_owned(),
        image_ref: String::new(),
    }
}

/// Sandboxes: `+` one that runs, `-` one that does not, the oldest first.
fn report(sandboxes: &str, containers: &[&str]) -> PodState {
    let sandbox = |(number, state): (usize, char)| Sandbox {
        id: format!("s{number}"),
        attempt: u32::try_from(number).unwrap(),
        ready: state == '+',
        created_at: 1,
        ips: vec!["10.0.0.2".to_owned()],
    };
    let mut report = PodState {
        sandboxes: sandboxes.chars().enumerate().map(sandbox).collect(),
        containers: containers.iter().map(|c| container(c)).collect(),
    };
    report.sort();
    report
}

fn plan_with(pod: &Pod, goal: Goal, report: &PodState, backoffs: &Backoffs, status: &PodStatus) -> Plan {
    let now = Now { time: Timestamp::from_second(NOW).unwrap(), instant: Instant::now() };
    Plan::new(&Input { pod, goal, report, status, backoffs, now })
}

fn plan(pod: &Pod, goal: Goal, report: &PodState) -> Plan {
    plan_with(pod, goal, report, &Backoffs::default(), &PodStatus::default())
}

#[test]
fn each_documented_behaviour() {
    use Goal::{End, Run};
    // What, restart policy, init containers, containers, goal, sandboxes, report, plan.
    type Row = (
        &'static str,
        &'static str,
        &'static [&'static str],
        &'static [&'static str],
        Goal,
        &'static str,
        &'static [&'static str],
        &'static str,
    );
    let rows: &[Row] = &[
        // Sandboxes.
        ("a new pod gets a sandbox first", "Always", &[], &["a"], Run, "", &[], "create sandbox 0"),
        (
            "containers follow in a running sandbox",
            "Always",
            &[],
            &["a", "b"],
            Run,
            "+",
            &[],
            "start a 0, start b 0",
        ),
        ("a pod that runs is left alone", "Always", &[], &["a"], Run, "+", &["a=running"], "nothing to do"),
        (
            "so it is after the node was restarted",
            "Always",
            &["i"],
            &["a"],
            Run,
            "+",
            &["i=0", "a=running"],
            "nothing to do",
        ),
        ("a sandbox that ended is replaced", "Always", &[], &["a"], Run, "-", &["a=137"], "create sandbox 1"),
        ("an empty one of a failed start as well", "Always", &[], &["a"], Run, "-", &[], "create sandbox 1"),
        (
            "what runs in a dead sandbox is killed",
            "Always",
            &[],
            &["a"],
            Run,
            "-",
            &["a=running"],
            "kill a (sandbox replaced), create sandbox 1",
        ),
        (
            "init containers run again in a new sandbox",
            "Always",
            &["i"],
            &["a"],
            Run,
            "-+",
            &["i=0", "a=137"],
            "start i 1",
        ),
        (
            "a leftover in an old sandbox is killed",
            "Always",
            &[],
            &["a", "b"],
            Run,
            "++",
            &["a@0=running", "b:1@1=running"],
            "kill a (sandbox replaced), start a 1",
        ),
        (
            "an old sandbox without containers goes",
            "Always",
            &[],
            &["a"],
            Run,
            "-+",
            &["a:2@1=running", "a:1@1=1"],
            "remove sandbox s0",
        ),
        (
            "an old sandbox stays while its container is the last state",
            "Always",
            &[],
            &["a"],
            Run,
            "-+",
            &["a@0=137", "a:1@1=running"],
            "nothing to do",
        ),
        // Init containers.
        ("the first init container alone", "Always", &["i", "j"], &["a"], Run, "+", &[], "start i 0"),
        ("the second after the first", "Always", &["i", "j"], &["a"], Run, "+", &["i=0"], "start j 0"),
        (
            "nothing beside a running one",
            "Always",
            &["i", "j"],
            &["a"],
            Run,
            "+",
            &["i=running"],
            "nothing to do",
        ),
        ("a failed one is tried again", "Always", &["i"], &["a"], Run, "+", &["i=1"], "start i 1"),
        ("so it is under OnFailure", "OnFailure", &["i"], &["a"], Run, "+", &["i=1"], "start i 1"),
        ("and not under Never", "Never", &["i"], &["a"], Run, "+", &["i=1"], "nothing to do"),
        ("containers after the last", "Always", &["i", "j"], &["a"], Run, "+", &["i=0", "j=0"], "start a 0"),
        (
            "none is run again once a container has begun",
            "Always",
            &["i"],
            &["a"],
            Run,
            "+",
            &["a=1"],
            "start a 1",
        ),
        (
            "one that was made and not started is made anew",
            "Always",
            &["i"],
            &["a"],
            Run,
            "+",
            &["i=created"],
            "start i 0",
        ),
        // Restart policies.
        ("Always: after success", "Always", &[], &["a"], Run, "+", &["a=0"], "start a 1"),
        ("Always: after failure", "Always", &[], &["a"], Run, "+", &["a=1"], "start a 1"),
        ("OnFailure: after failure", "OnFailure", &[], &["a"], Run, "+", &["a=1"], "start a 1"),
        (
            "OnFailure: not after success",
            "OnFailure",
            &[],
            &["a", "b"],
            Run,
            "+",
            &["a=0", "b=running"],
            "nothing to do",
        ),
        (
            "OnFailure: not after success in a sandbox of before",
            "OnFailure",
            &[],
            &["a", "b"],
            Run,
            "-+",
            &["a@0=0", "b:1@1=running"],
            "nothing to do",
        ),
        (
            "Never: not after failure",
            "Never",
            &[],
            &["a", "b"],
            Run,
            "+",
            &["a=1", "b=running"],
            "nothing to do",
        ),
        (
            "Never: not after success",
            "Never",
            &[],
            &["a", "b"],
            Run,
            "+",
            &["a=0", "b=running"],
            "nothing to do",
        ),
        (
            "made and not started: anew under its number",
            "Always",
            &[],
            &["a"],
            Run,
            "+",
            &["a:3=created"],
            "start a 3",
        ),
        (
            "an unknown state: killed and started anew",
            "Always",
            &[],
            &["a"],
            Run,
            "+",
            &["a=unknown"],
            "kill a (state unknown), start a 1",
        ),
        // Dead containers.
        (
            "one dead container is kept beside the newest",
            "Always",
            &[],
            &["a"],
            Run,
            "+",
            &["a=1", "a:1=1", "a:2=running"],
            "remove container a-0",
        ),
        (
            "the newest and the one before it stay",
            "Never",
            &[],
            &["a", "b"],
            Run,
            "+",
            &["a=1", "a:1=1", "b=running"],
            "nothing to do",
        ),
        // The end.
        (
            "everything that runs is killed, then the sandbox stopped",
            "Always",
            &["i"],
            &["a", "b"],
            End,
            "+",
            &["i=0", "a=running", "b=1"],
            "kill a (the pod ends), stop sandbox s0",
        ),
        (
            "an unknown state may run",
            "Always",
            &[],
            &["a"],
            End,
            "+",
            &["a=unknown"],
            "kill a (the pod ends), stop sandbox s0",
        ),
        ("a sandbox alone is stopped", "Always", &[], &["a"], End, "+", &[], "stop sandbox s0"),
        ("of several those that run", "Always", &[], &["a"], End, "-++", &["a=0"], "stop sandbox s2, s1"),
        ("what has ended is left alone", "Always", &[], &["a"], End, "-", &["a=0"], "nothing to do"),
        ("a pod that never began has nothing to end", "Always", &[], &["a"], End, "", &[], "nothing to do"),
    ];
    for (what, policy, inits, mains, goal, sandboxes, containers, want) in rows {
        let found = plan(&pod(policy, inits, mains), *goal, &report(sandboxes, containers)).to_string();
        assert_eq!(&found, want, "{what}");
    }
}

#[test]
fn a_changed_image_kills_the_container_and_starts_another_at_once_whatever_the_restart_policy() {
    for policy in ["Always", "OnFailure", "Never"] {
        let mut changed = pod(policy, &[], &["a", "b"]);
        changed.spec.as_mut().unwrap().containers[0].image = Some("i:2".into());
        let found = plan(&changed, Goal::Run, &report("+", &["a=running", "b=running"]));
        assert_eq!(found.to_string(), "kill a (image changed), start a 1", "{policy}");
    }
}

#[test]
fn a_container_in_its_back_off_waits_with_the_kubelets_words_and_holds_up_no_other() {
    let web = pod("Always", &[], &["a", "b"]);
    let mut backoffs = Backoffs::default();
    let ended = Timestamp::from_second(NOW - 5).unwrap();
    backoffs.restarting(&web.spec.as_ref().unwrap().containers[0], ended, ended);
    let found = plan_with(&web, Goal::Run, &report("+", &["a=1"]), &backoffs, &PodStatus::default());
    assert_eq!(found.to_string(), "start b 0, a waits (CrashLoopBackOff), look again in 5.0 s");
    assert_eq!(
        found.waiting["a"].message,
        "back-off 10s restarting failed container=a pod=web_default(uid-1)"
    );
    // With another image it does not wait.
    let mut corrected = web;
    corrected.spec.as_mut().unwrap().containers[0].image = Some("i:2".into());
    let found = plan_with(&corrected, Goal::Run, &report("+", &["a=1"]), &backoffs, &PodStatus::default());
    assert_eq!(found.to_string(), "start a 1, start b 0");
}

#[test]
fn a_start_that_failed_says_why_until_it_succeeds_and_is_tried_again_at_its_own_pace() {
    let web = pod("Always", &[], &["a", "b"]);
    let spec = web.spec.as_ref().unwrap().containers[0].clone();
    let waiting = Waiting { reason: "CreateContainerConfigError", message: "secret \"x\" not found".into() };
    let mut backoffs = Backoffs::default();
    backoffs.hold(&spec, waiting.clone(), Duration::from_secs(10), Instant::now());
    let found = plan_with(&web, Goal::Run, &report("+", &["b=running"]), &backoffs, &PodStatus::default());
    assert!(found.start.is_empty() && found.wake.unwrap() > Duration::from_secs(9), "{found}");
    assert_eq!(found.waiting["a"], waiting);
    backoffs.hold(&spec, waiting.clone(), Duration::ZERO, Instant::now());
    let found = plan_with(&web, Goal::Run, &report("+", &["b=running"]), &backoffs, &PodStatus::default());
    assert_eq!(found.to_string(), "start a 0, a waits (CreateContainerConfigError)");
}

#[test]
fn a_sandbox_that_could_not_be_made_waits_its_time() {
    let mut backoffs = Backoffs::default();
    backoffs.sandbox.failed(Instant::now());
    let found =
        plan_with(&pod("Always", &[], &["a"]), Goal::Run, &report("", &[]), &backoffs, &PodStatus::default());
    assert_eq!(found.sandbox, SandboxAction::Keep);
    assert!(found.wake.is_some_and(|w| w <= Duration::from_secs(1)), "{found}");
}

#[test]
fn the_count_of_restarts_goes_on_where_the_agent_has_lost_its_state() {
    let status: PodStatus = serde_json::from_value(json!({"containerStatuses": [
        {"name": "a", "restartCount": 4, "containerID": "moxlet://x", "image": "", "imageID": "", "ready": true}]}))
    .unwrap();
    let found =
        plan_with(&pod("Always", &[], &["a"]), Goal::Run, &report("+", &[]), &Backoffs::default(), &status);
    assert_eq!(found.to_string(), "start a 5");
}

#[test]
fn what_a_new_sandbox_needs_is_freed_before_it_is_made() {
    let found = plan(&pod("Always", &[], &["a"]), Goal::Run, &report("--", &["a@0=137"]));
    let SandboxAction::Create { attempt, stop, remove } = found.sandbox else { panic!("{found}") };
    assert_eq!((attempt, stop.len(), remove), (2, 2, vec!["s1".to_owned()]));
}

fn phases() -> impl Strategy<Value = String> {
    prop_oneof![Just("created"), Just("running"), Just("unknown"), Just("0"), Just("1")]
        .prop_map(str::to_owned)
}

prop_compose! {
    /// Any report: containers of three names in up to three sandboxes, only the last of which runs, if any.
    fn reports()(
        sandboxes in "(-{0,2}\\+?)",
        containers in prop::collection::vec(("[iab]", 0_u32..3, phases()), 0..8),
    ) -> PodState {
        let count = sandboxes.len().max(1);
        let mut seen = BTreeSet::new();
        let texts: Vec<String> = containers
            .into_iter()
            .filter(|(name, attempt, _)| seen.insert((name.clone(), *attempt)))
            .map(|(name, attempt, phase)| format!("{name}:{attempt}@{}={phase}", (attempt as usize).min(count - 1)))
            .collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        report(&sandboxes, &texts)
    }
}

/// The report after a plan was carried out and nothing else happened.
fn carried_out(plan: &Plan, report: &PodState) -> PodState {
    let mut after = report.clone();
    for kill in &plan.kill {
        let c = after.containers.iter_mut().find(|c| c.id == kill.id).unwrap();
        (c.phase, c.exit_code, c.finished_at) = (Phase::Exited, 137, NOW * 1_000_000_000);
    }
    match &plan.sandbox {
        SandboxAction::Keep => {}
        SandboxAction::Stop(ids) => {
            after.sandboxes.iter_mut().filter(|s| ids.contains(&s.id)).for_each(|s| s.ready = false);
        }
        SandboxAction::Create { attempt, remove, .. } => {
            after.sandboxes.iter_mut().for_each(|s| s.ready = false);
            after.sandboxes.retain(|s| !remove.contains(&s.id));
            let (id, ips) = (format!("s{attempt}"), vec!["10.0.0.3".to_owned()]);
            after.sandboxes.push(Sandbox { id, attempt: *attempt, ready: true, created_at: 2, ips });
        }
    }
    let sandbox = after.sandboxes.iter().map(|s| s.attempt).max().unwrap_or_default();
    for start in &plan.start {
        after.containers.retain(|c| Some(&c.id) != start.discard.as_ref());
        after.containers.push(container(&format!("{}:{}@{sandbox}=running", start.name, start.attempt)));
    }
    after.containers.retain(|c| !plan.remove_containers.contains(&c.id));
    after.sandboxes.retain(|s| !plan.remove_sandboxes.contains(&s.id));
    after.sort();
    after
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is reported: no container of a name runs beside another of it, and none is started beside one that may run.
    #[test]
    fn never_two_of_one_container(
        report in reports(), policy in "Always|OnFailure|Never", init in any::<bool>()
    ) {
        let web = pod(&policy, if init { &["i"] } else { &[] }, &["a", "b"]);
        let plan = plan(&web, Goal::Run, &report);
        for start in &plan.start {
            let killed = |c: &Container| plan.kill.iter().any(|k| k.id == c.id);
            prop_assert!(!report.history(&start.name).any(|c| may_run(c) && !killed(c)), "{plan}");
            prop_assert_eq!(plan.start.iter().filter(|s| s.name == start.name).count(), 1);
            // A number is given once, but to what was never started.
            let taken = report.history(&start.name).any(|c| c.attempt == start.attempt && Some(&c.id) != start.discard.as_ref());
            prop_assert!(!taken, "{plan}");
        }
    }

    /// Carried out a few times with nothing else happening, a plan is settled: nothing is done for ever.
    #[test]
    fn plans_settle_and_an_empty_plan_stays_empty(
        report in reports(), policy in "Always|OnFailure|Never", end in any::<bool>()
    ) {
        let (web, goal) = (pod(&policy, &["i"], &["a", "b"]), if end { Goal::End } else { Goal::Run });
        let mut report = report;
        let mut last = plan(&web, goal, &report);
        for _ in 0..8 {
            if last.is_settled() {
                break;
            }
            report = carried_out(&last, &report);
            // An init container that was started comes to its end.
            for c in report.containers.iter_mut().filter(|c| c.name == "i" && c.phase == Phase::Running) {
                (c.phase, c.exit_code) = (Phase::Exited, 0);
            }
            last = plan(&web, goal, &report);
        }
        prop_assert!(last.is_settled(), "{last}");
        prop_assert_eq!(&plan(&web, goal, &report), &last);
        if end {
            prop_assert!(!report.containers.iter().any(may_run) && !report.sandboxes.iter().any(|s| s.ready));
        }
    }

    /// At the end nothing is started, made or removed, and a container that runs is not forgotten.
    #[test]
    fn an_end_only_ends(report in reports()) {
        let plan = plan(&pod("Always", &["i"], &["a", "b"]), Goal::End, &report);
        prop_assert!(plan.start.is_empty() && plan.remove_containers.is_empty() && plan.remove_sandboxes.is_empty());
        let sandbox_is_made = matches!(plan.sandbox, SandboxAction::Create { .. });
        prop_assert!(!sandbox_is_made);
        for c in report.containers.iter().filter(|c| may_run(c)) {
            prop_assert!(plan.kill.iter().any(|k| k.id == c.id), "{plan}");
        }
    }
}
