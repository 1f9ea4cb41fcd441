//! Strategic merge patches, as far as a node's annotations and conditions need them.

use serde_json::{Map, Value};

/// Merges objects key by key; `null` takes a key away. Conditions are merged by their type in a strategic patch; any
/// other list is replaced.
pub(super) fn merge(target: &mut Value, patch: &Value, strategic: bool) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let target = target.as_object_mut().unwrap();
    for (key, value) in patch {
        match (target.get_mut(key), value) {
            (_, Value::Null) => drop(target.remove(key)),
            (Some(Value::Array(old)), Value::Array(new)) if strategic && key == "conditions" => {
                by_type(old, new)
            }
            (Some(old), value) => merge(old, value, strategic),
            (None, value) => {
                let mut fresh = Value::Null;
                merge(&mut fresh, value, strategic);
                target.insert(key.clone(), fresh);
            }
        }
    }
}

fn by_type(old: &mut Vec<Value>, new: &[Value]) {
    for condition in new {
        match old.iter_mut().find(|there| there["type"] == condition["type"]) {
            Some(there) => merge(there, condition, true),
            None => old.push(condition.clone()),
        }
    }
}
