//! Parameter groups: which parameters have a learning rate or a weight decay of their own. Chosen by name.

use std::sync::Arc;

use super::rule::{check_setting, Rule, Whole};
use crate::Result;

/// Parameters that are treated alike.
#[derive(Clone)]
pub struct ParameterGroup {
    matches: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    lr: Option<f64>,
    weight_decay: Option<f64>,
    is_scaled: bool,
}

impl std::fmt::Debug for ParameterGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParameterGroup")
            .field("lr", &self.lr)
            .field("weight_decay", &self.weight_decay)
            .field("is_scaled", &self.is_scaled)
            .finish_non_exhaustive()
    }
}

impl ParameterGroup {
    /// The parameters whose name one of `patterns` describes; `*` stands for any characters, also none and
    /// dots.
    ///
    /// ```
    /// use phalanx_ddp_core::optim::ParameterGroup;
    /// let group = ParameterGroup::matching(["*.bias", "*norm*"]).weight_decay(0.0);
    /// assert!(group.contains("encoder.0.norm.weight") && !group.contains("encoder.0.weight"));
    /// ```
    pub fn matching<P: Into<String>>(patterns: impl IntoIterator<Item = P>) -> Self {
        let patterns: Vec<String> = patterns.into_iter().map(Into::into).collect();
        Self::chosen(move |name| patterns.iter().any(|pattern| describes(pattern, name)))
    }

    /// The parameters for whose name `matches` holds. It must say the same on every rank.
    pub fn chosen(matches: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self { matches: Arc::new(matches), lr: None, weight_decay: None, is_scaled: true }
    }

    /// With a learning rate of its own, while the optimizer's is its initial one: what
    /// [`set_lr`](super::Optimizer::set_lr) does to that, it does to this, in proportion.
    #[must_use]
    pub fn lr(self, lr: f64) -> Self {
        Self { lr: Some(lr), ..self }
    }

    /// With a weight decay of its own.
    #[must_use]
    pub fn weight_decay(self, weight_decay: f64) -> Self {
        Self { weight_decay: Some(weight_decay), ..self }
    }

    /// Whose steps are not scaled by norms, where the rule does that ([`Lars`](super::Lars), [`Lamb`](super::Lamb)):
    /// usual for biases and norms.
    #[must_use]
    pub fn without_trust_ratio(self) -> Self {
        Self { is_scaled: false, ..self }
    }

    /// What its parameters have that would have a learning rate and a decay of their `own` without it, where the
    /// optimizer's rate is `lr` at first.
    fn over(&self, (own_lr, own_decay): (f64, f64), lr: f64) -> GroupSettings {
        let own = self.lr.unwrap_or(own_lr);
        GroupSettings {
            // Also where both are zero.
            lr_factor: if (own - lr).abs() > 0.0 { own / lr } else { 1.0 },
            weight_decay: self.weight_decay.unwrap_or(own_decay),
            is_scaled: self.is_scaled,
        }
    }

    /// Whether it has the parameter of this name, if no group before it does.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        (self.matches)(name)
    }
}

/// Groups in the order in which they are asked: a parameter belongs to the first that contains it, else to
/// one with the optimizer's own settings.
///
/// ```
/// use phalanx_ddp_core::optim::{ParameterGroup, ParameterGroups};
/// let groups = ParameterGroups::default()
///     .with(ParameterGroup::matching(["*.bias", "*norm*"]).weight_decay(0.0))
///     .with(ParameterGroup::matching(["embedding.*"]).lr(1e-4));
/// # drop(groups);
/// ```
#[derive(Clone, Debug, Default)]
pub struct ParameterGroups {
    groups: Vec<ParameterGroup>,
}

/// What the parameters of a group have: a factor of the optimizer's learning rate, a weight decay, and whether norms
/// scale their steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct GroupSettings {
    pub(super) lr_factor: f64,
    pub(super) weight_decay: f64,
    pub(super) is_scaled: bool,
}

impl ParameterGroups {
    /// With another group, asked after those before it.
    #[must_use]
    pub fn with(mut self, group: ParameterGroup) -> Self {
        self.groups.push(group);
        self
    }

    /// The settings of each group, and last those of all other parameters: of parameters that the rule takes by the
    /// element, and of those that it takes whole.
    pub(super) fn settings(&self, rule: &dyn Rule) -> Result<Vec<[GroupSettings; 2]>> {
        let of_rule = (rule.lr(), rule.weight_decay());
        let others = rule.whole().map_or(of_rule, Whole::others);
        let mut all = Vec::with_capacity(self.groups.len() + 1);
        for group in &self.groups {
            if let Some(lr) = group.lr {
                let is_right = lr >= 0.0 && lr.is_finite() && rule.lr() > 0.0;
                check_setting(
                    "lr of a group",
                    lr,
                    is_right,
                    "a number ≥ 0, beside an lr > 0 of the rule",
                )?;
            }
            let decay = group.weight_decay.unwrap_or(0.0);
            let is_right = decay >= 0.0 && decay.is_finite();
            check_setting("weight_decay of a group", decay, is_right, "a number ≥ 0")?;
            all.push([others, of_rule].map(|own| group.over(own, rule.lr())));
        }
        let none = ParameterGroup::matching(["*"]);
        all.push([others, of_rule].map(|own| none.over(own, rule.lr())));
        Ok(all)
    }

    /// Which of the settings a parameter has.
    pub(super) fn index_of(&self, name: &str) -> usize {
        self.groups.iter().position(|group| group.contains(name)).unwrap_or(self.groups.len())
    }
}

/// Whether `pattern` describes all of `name`.
pub(super) fn describes(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::AdamW;

    #[test]
    fn patterns_describe_whole_names() {
        for (pattern, name, expected) in [
            ("fc.bias", "fc.bias", true),
            ("fc.bias", "fc.bias2", false),
            ("*.bias", "a.b.bias", true),
            ("*.bias", "bias", false),
            ("*norm*", "norm", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "acb", false),
            ("*", "", true),
            ("a*a", "a", false),
            ("", "x", false),
        ] {
            assert_eq!(describes(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn the_first_group_that_contains_a_parameter_has_it() {
        let groups = ParameterGroups::default()
            .with(ParameterGroup::matching(["*.bias"]).weight_decay(0.0).without_trust_ratio())
            .with(ParameterGroup::matching(["head.*"]).lr(2e-3));
        let rule = AdamW { lr: 1e-3, weight_decay: 0.1, ..AdamW::default() };
        let settings = groups.settings(&rule).unwrap();
        let of = |name| settings[groups.index_of(name)][0];
        let expected = |lr_factor, weight_decay, is_scaled| GroupSettings {
            lr_factor,
            weight_decay,
            is_scaled,
        };
        assert_eq!(of("head.bias"), expected(1.0, 0.0, false));
        assert_eq!(of("head.weight"), expected(2.0, 0.1, true));
        assert_eq!(of("body.weight"), expected(1.0, 0.1, true));
    }

    #[test]
    fn settings_that_cannot_be_are_refused() {
        let refused = |group: ParameterGroup| {
            ParameterGroups::default().with(group).settings(&AdamW::default()).is_err()
        };
        assert!(refused(ParameterGroup::matching(["*"]).lr(f64::NAN)));
        assert!(refused(ParameterGroup::matching(["*"]).weight_decay(-1.0)));
        assert!(!refused(ParameterGroup::matching(["*"]).lr(0.0)));
    }
}
