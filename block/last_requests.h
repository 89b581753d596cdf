// LastRequests: what a node that is being closed still writes does not wait for ever.

#pragma once

#include <memory>

#include "block/node.h"
#include "block/repeated_cancel.h"

namespace gantry::block {

/// From its construction on, requests of `node` - and of those below it that nobody else uses - that wait for a server
/// that is lost fail; after a minute so do those that a server does not answer (Node::cancel_in_flight()). Until
/// over(), which must have returned before it is destroyed. Main loop.
class LastRequests {
  public:
    explicit LastRequests(std::shared_ptr<Node> node);
    Task<void> over() { return cancel_.over(); }

    /// Whether nobody has use for the node any more: it is closed, or will be.
    static bool concern(const Node& node);

  private:
    RepeatedCancel cancel_;
};

}  // namespace gantry::block
