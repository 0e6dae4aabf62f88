//! A container's environment: service links, then `envFrom`, then `env`, each over what was before it.

pub(crate) mod expand;
pub(crate) mod fields;
pub(crate) mod services;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvFromSource, EnvVarSource, Pod, Secret};

use self::fields::Facts;
use crate::model::names;
use crate::{
    cluster::Cluster,
    error::{Error, Result},
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

/// The text of a Secret's key. CRI carries variables as text: other bytes would become others on the way.
fn secret_text(variable: &str, secret: &str, key: &str, bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes).map(str::to_owned);
    text.map_err(|_| {
        Error::ContainerConfig(format!(
            "environment variable {variable}: the value of key {key} in Secret {secret} is not valid UTF-8; mount it as a volume"
        ))
    })
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
    let sources = Sources { namespace, objects, pod, container, facts };
    let mut own = Variables::default();
    let mut skipped = Vec::new();
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let Some((label, pairs)) = sources.all_of(from)? else { continue };
        let mut invalid = Vec::new();
        for (key, value) in pairs {
            let name = format!("{prefix}{key}");
            if is_name(&name) { own.put(name, value) } else { invalid.push(name) }
        }
        if !invalid.is_empty() {
            invalid.sort();
            skipped.push((label, invalid));
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => {
                let text = variable.value.as_deref().unwrap_or_default();
                let known = |n: &str| own.values.get(n).or_else(|| links.get(n)).map(String::as_str);
                Some(expand::expand(text, known))
            }
            Some(from) => sources.one_of(&variable.name, from)?,
        };
        if let Some(value) = value {
            own.put(variable.name.clone(), value);
        }
    }
    Ok(Environment { variables: own.after(links), skipped })
}

/// A pod's own variables, in the order in which their names came first.
#[derive(Default)]
struct Variables {
    order: Vec<String>,
    values: HashMap<String, String>,
}

impl Variables {
    fn put(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }

    /// Service links stand first and give way to what the pod sets itself.
    fn after(mut self, links: BTreeMap<String, String>) -> Vec<(String, String)> {
        let mut all: Vec<_> = links.into_iter().filter(|(k, _)| !self.values.contains_key(k)).collect();
        all.extend(self.order.into_iter().filter_map(|k| self.values.remove(&k).map(|v| (k, v))));
        all
    }
}

/// Where values come from.
struct Sources<'a> {
    namespace: &'a str,
    objects: Objects,
    pod: &'a Pod,
    container: &'a Container,
    facts: &'a Facts,
}

/// An object's name for people, and all that it has.
type Whole = (String, Vec<(String, String)>);

impl Sources<'_> {
    /// All of an object; nothing of one that may be missing and is.
    fn all_of(&self, from: &EnvFromSource) -> Result<Option<Whole>> {
        let label = |kind: &str, name: &str| format!("{kind} {}/{name}", self.namespace);
        if let Some(r) = &from.config_map_ref {
            let map = unless_optional(self.objects.config_map(&r.name), r.optional, no_config_map(&r.name))?;
            let pairs = |map: &ConfigMap| map.data.clone().unwrap_or_default().into_iter().collect();
            return Ok(map.map(|map| (label("ConfigMap", &r.name), pairs(map))));
        }
        if let Some(r) = &from.secret_ref {
            let secret = unless_optional(self.objects.secret(&r.name), r.optional, no_secret(&r.name))?;
            let Some(secret) = secret else { return Ok(None) };
            let prefix = from.prefix.as_deref().unwrap_or_default();
            let text = |key: &String, bytes: &[u8]| {
                let text = secret_text(&format!("{prefix}{key}"), &self.full(&r.name), key, bytes)?;
                Ok((key.clone(), text))
            };
            let data = secret.data.iter().flatten();
            let pairs = data.map(|(key, value)| text(key, &value.0)).collect::<Result<_>>()?;
            return Ok(Some((label("Secret", &r.name), pairs)));
        }
        Ok(None)
    }

    /// One value; none if it may be missing and is.
    fn one_of(&self, variable: &str, from: &EnvVarSource) -> Result<Option<String>> {
        let unsupported = |text| Error::ContainerConfig(text);
        if let Some(f) = &from.field_ref {
            let value = fields::field(self.pod, self.facts, &f.field_path);
            let value =
                value.ok_or_else(|| unsupported(format!("unsupported fieldPath: {}", f.field_path)))?;
            return Ok(Some(value));
        }
        if let Some(r) = &from.resource_field_ref {
            let value = fields::resource(self.pod, Some(self.container), self.facts, r);
            let value = value
                .ok_or_else(|| unsupported(format!("unsupported container resource : {}", r.resource)))?;
            return Ok(Some(value));
        }
        if let Some(r) = &from.config_map_key_ref {
            let map = unless_optional(self.objects.config_map(&r.name), r.optional, no_config_map(&r.name))?;
            let Some(map) = map else { return Ok(None) };
            let value = map.data.as_ref().and_then(|d| d.get(&r.key)).cloned();
            return unless_optional(value, r.optional, self.no_key("ConfigMap", &r.key, &r.name));
        }
        if let Some(r) = &from.secret_key_ref {
            let secret = unless_optional(self.objects.secret(&r.name), r.optional, no_secret(&r.name))?;
            let Some(secret) = secret else { return Ok(None) };
            let value = secret.data.as_ref().and_then(|d| d.get(&r.key));
            let value =
                value.map(|v| secret_text(variable, &self.full(&r.name), &r.key, &v.0)).transpose()?;
            return unless_optional(value, r.optional, self.no_key("Secret", &r.key, &r.name));
        }
        Ok(Some(String::new()))
    }

    /// An object's namespace and name.
    fn full(&self, name: &str) -> String {
        format!("{}/{name}", self.namespace)
    }

    fn no_key(&self, kind: &str, key: &str, name: &str) -> String {
        format!("couldn't find key {key} in {kind} {}/{name}", self.namespace)
    }
}

fn no_config_map(name: &str) -> String {
    format!("configmap \"{name}\" not found")
}

fn no_secret(name: &str) -> String {
    format!("secret \"{name}\" not found")
}

/// What is missing is an error, unless it may be.
fn unless_optional<T>(found: Option<T>, optional: Option<bool>, missing: String) -> Result<Option<T>> {
    if found.is_none() && optional != Some(true) {
        return Err(Error::ContainerConfig(missing));
    }
    Ok(found)
}

/// A container's command or arguments with its variables in them.
pub(crate) fn arguments(list: Option<&Vec<String>>, variables: &[(String, String)]) -> Vec<String> {
    let known: HashMap<&str, &str> = variables.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    list.into_iter().flatten().map(|text| expand::expand(text, |n| known.get(n).copied())).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn sources<'a>(pod: &'a Pod, container: &'a Container, facts: &'a Facts) -> Sources<'a> {
        let secret: Secret =
            serde_json::from_value(serde_json::json!({"data": {"good": "YQ==", "raw": "Qf/+Qg=="}})).unwrap();
        let objects = Objects {
            secrets: HashMap::from([("s".to_owned(), Some(Arc::new(secret)))]),
            ..Objects::default()
        };
        Sources { namespace: "d", objects, pod, container, facts }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_by_the_name_of_their_variable() {
        let (pod, container, facts) = (Pod::default(), Container::default(), Facts::default());
        let sources = sources(&pod, &container, &facts);
        let key = |key: &str| -> EnvVarSource {
            serde_json::from_value(serde_json::json!({"secretKeyRef": {"name": "s", "key": key}})).unwrap()
        };
        assert_eq!(sources.one_of("KEY", &key("good")).unwrap().as_deref(), Some("a"));
        let error = sources.one_of("KEY", &key("raw")).unwrap_err().to_string();
        assert!(error.contains("variable KEY") && error.contains("key raw in Secret d/s"), "{error}");
        let from: EnvFromSource =
            serde_json::from_value(serde_json::json!({"prefix": "P_", "secretRef": {"name": "s"}})).unwrap();
        let error = sources.all_of(&from).unwrap_err().to_string();
        assert!(error.contains("variable P_raw"), "{error}");
    }
}
