#include "cli/registry.h"

#include <array>

#include "block/formats/qcow2/qcow2.h"
#include "block/formats/raw.h"
#include "block/protocols/file.h"
#include "block/protocols/null.h"
#include "exports/vduse/export.h"
#include "exports/vhost_user/export.h"
#include "fuse/export.h"
#include "nbd/client/node.h"
#include "nbd/server.h"
#include "runtime/check.h"
#include "schema/schema.h"

namespace gantry::cli {

std::span<const block::Driver> drivers() {
    static const std::array kDrivers = {
        block::kFileDriver, block::kHostDeviceDriver, block::kNullCoDriver, block::kNullAioDriver,
        block::kRawDriver,  block::kQcow2Driver,      nbd::kNbdDriver,
    };
    return kDrivers;
}

std::span<const exports::ExportType> export_types() {
    static const std::array kTypes = {
        nbd::kNbdExportType,
        fuse::kFuseExportType,
        vhost_user::kVhostUserExportType,
        vduse::kVduseExportType,
    };
    return kTypes;
}

namespace {

template <class Row>
void check_against(std::string_view enum_name, std::span<const Row> rows) {
    const schema::Type& type = schema::type(enum_name);
    CHECK(type.values.size() == rows.size(), "the schema and cli/registry.cc name the same things");
    for (const Row& row : rows)
        CHECK(schema::has_value(type, row.name), "the schema and cli/registry.cc name the same things");
}

}  // namespace

void check_registry() {
    check_against("BlockdevDriver", drivers());
    check_against("BlockExportType", export_types());
}

}  // namespace gantry::cli
