// NbdServerOptions of the schema as the server wants them; shared by nbd-server-start and --nbd-server.

#pragma once

#include "nbd/server.h"
#include "qmp/services.h"
#include "schema/value.h"

namespace gantry::qmp {

/// `arguments` is validated; the addresses are flat.
Result<nbd::ServerOptions> nbd_server_options(const Services& services, const json::object& arguments);

}  // namespace gantry::qmp
