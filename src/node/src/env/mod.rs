//! A container's environment: service links, then `envFrom`, then `env`, each over what was before it.

pub(crate) mod expand;
pub(crate) mod fields;
pub(crate) mod services;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret};

use self::fields::Facts;
use crate::{
    cluster::Cluster,
    error::{Error, Result},
    pods::names,
};

/// The objects that a container's environment is made of, fetched side by side.
#[derive(Default)]
struct Objects {
    config_maps: HashMap<String, Option<Arc<ConfigMap>>>,
    secrets: HashMap<String, Option<Arc<Secret>>>,
}

/// What became of an environment.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    /// Variables in a stable order, later ones over earlier ones.
    pub(crate) variables: Vec<(String, String)>,
    /// Keys of `envFrom` that cannot be variables, with the object they are from.
    pub(crate) skipped: Vec<(String, Vec<String>)>,
}

fn absent<T>(answer: Result<T>) -> Result<Option<Arc<T>>> {
    match answer {
        Ok(found) => Ok(Some(Arc::new(found))),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

impl Objects {
    async fn fetch(cluster: &dyn Cluster, namespace: &str, container: &Container) -> Result<Self> {
        let mut maps = Vec::new();
        let mut secrets = Vec::new();
        for from in container.env_from.iter().flatten() {
            maps.extend(from.config_map_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_ref.as_ref().map(|r| r.name.clone()));
        }
        for from in container.env.iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            maps.extend(from.config_map_key_ref.as_ref().map(|r| r.name.clone()));
            secrets.extend(from.secret_key_ref.as_ref().map(|r| r.name.clone()));
        }
        for list in [&mut maps, &mut secrets] {
            list.sort();
            list.dedup();
        }
        let maps = futures::future::try_join_all(maps.into_iter().map(|n| async move {
            Ok::<_, Error>((n.clone(), absent(cluster.config_map(namespace, &n).await)?))
        }));
        let secrets = futures::future::try_join_all(secrets.into_iter().map(|n| async move {
            Ok::<_, Error>((n.clone(), absent(cluster.secret(namespace, &n).await)?))
        }));
        let (maps, secrets) = futures::try_join!(maps, secrets)?;
        Ok(Self { config_maps: maps.into_iter().collect(), secrets: secrets.into_iter().collect() })
    }

    fn config_map(&self, name: &str) -> Option<&ConfigMap> {
        self.config_maps.get(name).and_then(Option::as_deref)
    }

    fn secret(&self, name: &str) -> Option<&Secret> {
        self.secrets.get(name).and_then(Option::as_deref)
    }
}

/// A name that a process can have in its environment: printable ASCII without `=`.
fn is_name(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=')
}

fn secret_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Makes a container's environment.
///
/// # Errors
/// With the kubelet's words for `CreateContainerConfigError`.
pub(crate) async fn environment(
    cluster: &dyn Cluster,
    pod: &Pod,
    container: &Container,
    facts: &Facts,
    links: BTreeMap<String, String>,
) -> Result<Environment> {
    let namespace = names::namespace(pod);
    let objects = Objects::fetch(cluster, namespace, container).await?;
    let mut order: Vec<String> = Vec::new();
    let mut values: HashMap<String, String> = HashMap::new();
    let mut skipped = Vec::new();

    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (label, pairs, optional, missing): (_, Option<Vec<(String, String)>>, _, _) = if let Some(r) =
            &from.config_map_ref
        {
            let found =
                objects.config_map(&r.name).map(|m| m.data.clone().unwrap_or_default().into_iter().collect());
            (
                format!("ConfigMap {namespace}/{}", r.name),
                found,
                r.optional,
                format!("configmap \"{}\" not found", r.name),
            )
        } else if let Some(r) = &from.secret_ref {
            let found = objects
                .secret(&r.name)
                .map(|s| s.data.iter().flatten().map(|(k, v)| (k.clone(), secret_text(&v.0))).collect());
            (
                format!("Secret {namespace}/{}", r.name),
                found,
                r.optional,
                format!("secret \"{}\" not found", r.name),
            )
        } else {
            continue;
        };
        let Some(pairs) = pairs else {
            if optional == Some(true) {
                continue;
            }
            return Err(Error::ContainerConfig(missing));
        };
        let mut invalid = Vec::new();
        for (key, value) in pairs {
            let name = format!("{prefix}{key}");
            if !is_name(&name) {
                invalid.push(name);
                continue;
            }
            put(&mut order, &mut values, name, value);
        }
        if !invalid.is_empty() {
            invalid.sort();
            skipped.push((label, invalid));
        }
    }

    for variable in container.env.iter().flatten() {
        let value = match (&variable.value_from, variable.value.as_deref().unwrap_or_default()) {
            (None, text) => {
                Some(expand::expand(text, |n| values.get(n).or_else(|| links.get(n)).map(String::as_str)))
            }
            (Some(from), _) => {
                if let Some(f) = &from.field_ref {
                    Some(fields::field(pod, facts, &f.field_path).ok_or_else(|| {
                        Error::ContainerConfig(format!("unsupported fieldPath: {}", f.field_path))
                    })?)
                } else if let Some(r) = &from.resource_field_ref {
                    Some(fields::resource(pod, Some(container), facts, r).ok_or_else(|| {
                        Error::ContainerConfig(format!("unsupported container resource : {}", r.resource))
                    })?)
                } else if let Some(r) = &from.config_map_key_ref {
                    match objects.config_map(&r.name) {
                        None if r.optional == Some(true) => None,
                        None => {
                            return Err(Error::ContainerConfig(format!(
                                "configmap \"{}\" not found",
                                r.name
                            )));
                        }
                        Some(map) => match map.data.as_ref().and_then(|d| d.get(&r.key)) {
                            Some(v) => Some(v.clone()),
                            None if r.optional == Some(true) => None,
                            None => {
                                return Err(Error::ContainerConfig(format!(
                                    "couldn't find key {} in ConfigMap {namespace}/{}",
                                    r.key, r.name
                                )));
                            }
                        },
                    }
                } else if let Some(r) = &from.secret_key_ref {
                    match objects.secret(&r.name) {
                        None if r.optional == Some(true) => None,
                        None => {
                            return Err(Error::ContainerConfig(format!("secret \"{}\" not found", r.name)));
                        }
                        Some(secret) => match secret.data.as_ref().and_then(|d| d.get(&r.key)) {
                            Some(v) => Some(secret_text(&v.0)),
                            None if r.optional == Some(true) => None,
                            None => {
                                return Err(Error::ContainerConfig(format!(
                                    "couldn't find key {} in Secret {namespace}/{}",
                                    r.key, r.name
                                )));
                            }
                        },
                    }
                } else {
                    Some(String::new())
                }
            }
        };
        if let Some(value) = value {
            put(&mut order, &mut values, variable.name.clone(), value);
        }
    }

    // Service links stand first and give way to what the pod sets itself.
    let mut variables: Vec<(String, String)> =
        links.into_iter().filter(|(k, _)| !values.contains_key(k)).collect();
    variables.extend(order.into_iter().filter_map(|k| values.remove(&k).map(|v| (k, v))));
    Ok(Environment { variables, skipped })
}

fn put(order: &mut Vec<String>, values: &mut HashMap<String, String>, name: String, value: String) {
    if values.insert(name.clone(), value).is_none() {
        order.push(name);
    }
}

/// A container's command or arguments with its variables in them.
pub(crate) fn arguments(list: Option<&Vec<String>>, variables: &[(String, String)]) -> Vec<String> {
    let known: HashMap<&str, &str> = variables.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    list.into_iter().flatten().map(|text| expand::expand(text, |n| known.get(n).copied())).collect()
}
